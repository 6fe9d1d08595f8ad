"""`gpkernels train | sample | report | presets`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpkernels._extras import need
from gpkernels.errors import UserError

if TYPE_CHECKING:
    from gpkernels.training.callbacks import Callback
    from gpkernels.training.config import TrainConfig
    from gpkernels.training.data import ImageSet
    from gpkernels.training.processes import Processes

GROUPS = {
    "preset": ("settings to start from", "The defaults below are ls-gan-pg's; other presets have their own."),
    "data": ("images", None),
    "loss": ("loss and penalty", None),
    "generator": ("nets", None),
    "batch_size": ("training", None),
    "seed": ("this run", None),
}
"""Titles of the flags in --help, by the field of TrainConfig each begins with."""

_TRAIN = """Trains a GAN into a run folder: config.json, log.jsonl, samples, curves, checkpoints, report.html.
A setting is taken from its flag, else from --config, else from the preset."""
_OF_EACH_MACHINE = ("data", "cache")
"""Settings that each process takes from its own command line."""


def add_commands(commands: Any) -> None:
    """Adds them to the subparsers of the command line."""
    train = commands.add_parser("train", help="train a GAN", description=_TRAIN)
    add_train_options(train)
    sample = commands.add_parser("sample", help="draw images from a checkpoint")
    sample.add_argument("checkpoint", type=Path, help="a run folder, or one of its checkpoints")
    sample.add_argument("--n", type=int, default=64, help="how many images (default: 64)")
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="the PNG to write (default: grid.png)")
    sample.add_argument("--seed", type=int, default=0, help="seed of the latent vectors (default: 0)")
    sample.set_defaults(run=_sample)
    report = commands.add_parser("report", help="write report.html of a run anew", description=_REPORT)
    report.add_argument("folder", type=Path, metavar="RUN", help="the run folder")
    report.add_argument("--data", help="the training images, as for train (default: the run's own)")
    report.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    report.set_defaults(run=_report)
    presets = commands.add_parser("presets", help="list the presets of train")
    presets.set_defaults(run=_presets)


_REPORT = """Writes RUN/report.html: one file without scripts, pictures inside, with the config, curves, a timeline of
samples, walks between latent vectors, the training images nearest to samples, the machine, and how to repeat the run.
train writes it at its end."""


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """One flag for every field of TrainConfig, and those that say where and what is shown."""
    from gpkernels.training.config import add_flag, settings

    where = parser.add_argument_group("folders and files")
    where.add_argument("--out", type=Path, default=None, help="the run folder (default: runs/PRESET-NNN, a new one)")
    where.add_argument("--resume", action="store_true", help="go on from the newest checkpoint (default: start)")
    where.add_argument(
        "--config", type=Path, metavar="FILE", help="settings from a run's config.json, or TOML (default: none)"
    )
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--tracker",
        metavar="NAMES",
        help="none, or trackers of Accelerate, comma-separated: tensorboard (into --out), wandb, mlflow, aim, clearml, "
        "comet_ml, dvclive, swanlab, trackio (default: tensorboard where it is installed; on resume, those before)",
    )
    shown.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write report.html at the end (default: True)",
    )
    group = shown
    for name in settings():
        if name in GROUPS:
            group = parser.add_argument_group(*GROUPS[name])
        add_flag(group, name)
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    need("train", "numpy", "PIL", "matplotlib", "rich", "safetensors", "filelock", "accelerate")
    from gpkernels.training import processes
    from gpkernels.training.callbacks import Report, Trackers
    from gpkernels.training.progress import Progress

    with processes.join(_device(options)) as joined:
        config, state, out = joined.agree(lambda: _begin(options))
        config = dataclasses.replace(config, **_given(options, _OF_EACH_MACHINE))
        callbacks: list[Callback] = []
        if joined.main:
            callbacks = [Progress(), Trackers(*_tracker_names(options.tracker, out if options.resume else None))]
            callbacks += [Report()] * options.report
        return _run(config, state, out, joined, callbacks, others=hasattr(options, "data"))


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The settings among `names` that have a flag on the command line."""
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _device(options: argparse.Namespace) -> str:
    """What `_begin` finds for --device, as far as files of this machine tell; what is wrong with them it says then."""
    from gpkernels.training import config_file

    if hasattr(options, "device"):
        return options.device
    found = "auto"
    for file in (options.out / "config.json" if options.resume and options.out else None, options.config):
        if file is not None:
            with contextlib.suppress(UserError, OSError):
                found = config_file.read(file).get("device", found)
    return found


def _begin(options: argparse.Namespace) -> tuple[TrainConfig, dict[str, Any] | None, Path]:
    """The settings, the state to go on from and the run folder. Of several processes the main one finds them for all:
    no other machine needs to have the folder, or a file of settings."""
    from gpkernels.training import checkpoint, config_file, disk
    from gpkernels.training.config import TrainConfig, check_unchanged, settings

    given = _given(options, settings())
    if not options.resume:
        config = config_file.with_overrides(options.config, given)
        if options.out is not None:
            checkpoint.check_unused(options.out)
            disk.check_free(options.out)
        return config, None, options.out or _new_folder(config.preset)
    if options.out is None:
        raise UserError("--resume: wanted --out, the run folder to go on with, got none")
    if options.config is not None:
        given = {**config_file.read(options.config), **given}
    state = checkpoint.load(options.out)
    saved = state["config"]
    check_unchanged(saved, given)
    steps = given.get("steps", saved.get("steps"))
    if hasattr(options, "epochs") and not hasattr(options, "steps") and steps is not None:
        raise UserError(f"--epochs: this run ends by --steps {steps}; wanted --steps, got --epochs {options.epochs}")
    images = state["images"]
    if images is not None and images["given"] and not hasattr(options, "data"):
        raise UserError(
            f"--data: wanted images by name, since a program gave this run its own ({images['name']!r}, "
            f"{images['count']} images), got none; it goes on in that program, or with other images here"
        )
    disk.check_free(options.out)
    return TrainConfig.from_dict({**saved, **given}), state, options.out


def _run(
    config: TrainConfig,
    state: dict[str, Any] | None,
    out: Path,
    joined: Processes,
    callbacks: Sequence[Callback],
    others: bool,
) -> int:
    """Trains, as one of the processes of a run; the main one speaks. `others`: on other images than before, too."""
    from gpkernels.training import Trainer, checkpoint, data
    from gpkernels.training.progress import Reporter

    with joined.one_first(), Reporter(1, what="reading images", quiet=not joined.main) as reading:

        def progress(done: int, total: int) -> None:
            reading.total = total
            reading.update(done, "images")

        images = data.load(config, progress)
    if state is not None:
        _check_images(images, state, config, others)
    trainer = Trainer(config, images, out, callbacks=callbacks, resume=state, processes=joined)
    with _StopOnSignal(trainer.stop):
        finished = trainer.run()
    if not joined.main:
        return 0
    if not finished:
        print(f"stopped after step {trainer.step}, saved. Go on with: gpkernels train --out {out} --resume")
        return 0
    made = {
        "report": out / "report.html",
        "samples": max((out / "samples").glob("epoch_*.png"), default=out / "samples"),
        "curves": out / "curves.png",
    }
    shown = [f"{what} {path}" for what, path in made.items() if path.is_file()]
    print(f"done: {', '.join([*shown, f'checkpoint {checkpoint.held(out)[0]}'])}")
    return 0


def _check_images(images: ImageSet, state: dict[str, Any], config: TrainConfig, others: bool) -> None:
    """Raises UserError for images that the nets do not take; without `others`, for those not trained on before too."""
    if (state["channels"], state["size"]) != (images.channels, images.size):
        raise UserError(
            f"--data: wanted {state['channels']} channels of {state['size']} pixels, as the checkpoint was trained, "
            f"got {images.channels} of {images.size}"
        )
    if config.condition != "none" and state["classes"] != images.classes:
        raise UserError(
            f"--data: wanted {state['classes']} classes, as the checkpoint was trained, got {images.classes}"
        )
    then = state["images"]
    if not others and then is not None and then["fingerprint"] != images.fingerprint():
        raise UserError(
            f"--data: wanted the {then['count']} images of {then['name']} that the run was trained on, got "
            f"{len(images.images)} others of {config.data}; --data {config.data} goes on with these"
        )


def _tracker_names(wanted: str | None, resumed: Path | None) -> tuple[str, ...]:
    from gpkernels.training.callbacks import trackers

    if wanted is None:
        before = None if resumed is None else trackers.used_before(resumed)
        return trackers.usual() if before is None else before
    names = tuple(dict.fromkeys(name for name in wanted.split(",") if name))
    if "none" in names and len(names) > 1:
        raise UserError(f"--tracker: wanted none or names, got {wanted}")
    return () if names == ("none",) else names


class _StopOnSignal:
    """Turns Ctrl-C and SIGTERM into a call of `stop`; a second one is immediate, but for one within a second of the
    first: a launcher passes on what the terminal has sent already."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._requested: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._requested is None:
            self._requested = now
            self._stop()
        elif now - self._requested > 1:
            raise KeyboardInterrupt


def _new_folder(preset: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{preset}-{number:03d}").exists():
        number += 1
    return folder


def _sample(options: argparse.Namespace) -> int:
    need("sample", "numpy", "PIL", "safetensors", "filelock")
    if options.n < 1:
        raise UserError(f"--n: wanted a whole number >= 1, got {options.n}")
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed: wanted 0 to 2**31 - 1, got {options.seed}")
    import torch

    from gpkernels.training import checkpoint, models, pictures

    generator, config, step = checkpoint.load_generator(options.checkpoint)
    z = models.draw_z(config, options.n, torch.Generator().manual_seed(options.seed))
    images = models.images_of(generator, z, models.labels_in_turn(generator.classes, options.n))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_grid(options.out, images)
    print(f"{options.n} images of {config.preset} after step {step} -> {options.out}")
    return 0


def _report(options: argparse.Namespace) -> int:
    need("report", "numpy", "PIL", "matplotlib", "safetensors", "filelock")
    from gpkernels.training import checkpoint, data, report
    from gpkernels.training.processes import pick_device

    device = pick_device(options.device)
    generator, config, step = checkpoint.load_generator(options.folder)
    generator.to(device)
    images = data.load(dataclasses.replace(config, data=options.data or config.data))
    trained_on = checkpoint.images(checkpoint.find(options.folder))
    if options.data is None and trained_on is not None and trained_on["fingerprint"] != images.fingerprint():
        warning = data.of_others(trained_on, config)
        checkpoint.say(warning)
        images.note = " ".join(filter(None, (f"Note: {warning}.", images.note)))
    print(f"report {report.write(options.folder, config, step, generator, images)}")
    return 0


def _presets(options: argparse.Namespace) -> int:
    from gpkernels.training import presets

    print("\n\n".join(map(presets.describe, presets.PRESETS)))
    return 0
