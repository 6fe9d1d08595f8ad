"""The command line: gpkernels train | sample | evaluate | presets | losses | doctor.

What a person can put right ends in one line on stderr and exit code 2, without a traceback.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpkernels._version import __version__
from gpkernels.errors import UserError
from gpkernels.losses.command import add_command as add_losses
from gpkernels.metrics.command import add_command as add_evaluate


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = _parser().parse_args(argv)
        return options.run(options)
    except UserError as error:
        return _complain(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}")


def _complain(message: str) -> int:
    print("gpkernels: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpkernels", description="Exact gradient penalties for GAN training.")
    parser.add_argument("--version", action="version", version=f"gpkernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    train = commands.add_parser("train", help="train a GAN", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_train_options(train)
    sample = commands.add_parser("sample", help="draw images from a checkpoint")
    sample.add_argument("checkpoint", type=Path, help="a run folder, or one of its checkpoints")
    sample.add_argument("--n", type=int, default=64, help="how many images (default: 64)")
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="the PNG to write (default: grid.png)")
    sample.add_argument("--seed", type=int, default=0, help="seed of the latent vectors (default: 0)")
    sample.set_defaults(run=_sample)
    add_evaluate(commands)
    presets = commands.add_parser("presets", help="list the presets of train")
    presets.set_defaults(run=_presets)
    add_losses(commands)
    doctor = commands.add_parser("doctor", help="say what is built, which backend each op uses and why; check each op")
    doctor.set_defaults(run=_doctor)
    return parser


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """One flag for every field of TrainConfig, and those that say where."""
    from gpkernels.training.config import flag, setting_types, settings

    parser.add_argument("--out", type=Path, default=None, help="the run folder (default: runs/PRESET-NNN, a new one)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    kinds = setting_types()
    for name, spec in settings().items():
        extra: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kinds[name] is bool else {}
        if not extra:
            choices = spec.metadata["choices"]
            extra = {"type": kinds[name], "metavar": "|".join(choices) if choices else kinds[name].__name__.upper()}
        # SUPPRESS keeps what was not given out of the namespace: a preset or a resumed run decides there
        text = spec.metadata["help"] + ("" if spec.default is None else f" (default: {spec.default})")
        parser.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **extra)
    parser.set_defaults(run=_train)


def _need_train_extra() -> None:
    """The trainer's libraries, or one line that says how to get them."""
    try:
        import matplotlib  # noqa: F401
        import numpy  # noqa: F401
        import PIL  # noqa: F401
        import rich  # noqa: F401
        import safetensors  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"training wants {error.name}, which is not installed: pip install 'gpkernels[train]'"
        ) from None


_CHANGEABLE_ON_RESUME = {"epochs", "steps", "device", "log_every", "data", "checkpoint_minutes", "keep"}


def _train(options: argparse.Namespace) -> int:
    _need_train_extra()
    from gpkernels.training import Trainer, checkpoint, data, disk, from_preset
    from gpkernels.training.config import TrainConfig, flag, settings
    from gpkernels.training.progress import Progress, Reporter

    given = {name: getattr(options, name) for name in settings() if hasattr(options, name)}
    state = None
    if options.out is not None:
        disk.check_free(options.out)
    if options.resume:
        if options.out is None:
            raise UserError("--resume: wanted --out, the run folder to go on with, got none")
        state = checkpoint.load(options.out)
        saved = state["config"]
        for name, value in given.items():
            if name not in _CHANGEABLE_ON_RESUME and saved.get(name) != value:
                raise UserError(f"{flag(name)}: wanted {saved.get(name)}, as the checkpoint was trained, got {value}")
        config = TrainConfig.from_dict({**saved, **given})
    else:
        config = from_preset(given.pop("preset", "ls-gan-pg"), given)
        if options.out is not None:
            checkpoint.check_unused(options.out)
    out = options.out or _new_folder(config.preset)

    with Reporter(1, what="reading images") as reading:

        def progress(done: int, total: int) -> None:
            reading.total = total
            reading.update(done, "images")

        images = data.load(config, progress)
    if state is not None and (state["channels"], state["size"]) != (images.channels, images.size):
        raise UserError(
            f"--data: wanted {state['channels']} channels of {state['size']} pixels, as the checkpoint was trained, "
            f"got {images.channels} of {images.size}"
        )
    if state is not None and config.condition != "none" and state["classes"] != images.classes:
        raise UserError(
            f"--data: wanted {state['classes']} classes, as the checkpoint was trained, got {images.classes}"
        )
    trainer = Trainer(config, images, out, resume=state)
    with _StopOnSignal(trainer.stop), Reporter(trainer.total_steps, trainer.step) as report:
        trainer.callbacks = (*trainer.callbacks, Progress(report))
        for reason in images.skipped:
            report.say(f"skipped {reason}")
        if images.note:
            report.say(f"note: {images.note}")
        report.say(
            f"{config.preset} on {len(images.images)} images of {images.size}x{images.size} ({images.name}), "
            f"{trainer.total_steps} steps of {config.batch_size} on {trainer.device} -> {out}"
        )
        if trainer.step:
            report.say(f"resuming after step {trainer.step}")
        finished = trainer.run()
    if not finished:
        print(f"stopped after step {trainer.step}, saved. Go on with: gpkernels train --out {out} --resume")
        return 0
    newest = max((out / "samples").glob("epoch_*.png"))
    print(f"done: samples {newest}, curves {out / 'curves.png'}, checkpoint {checkpoint.held(out)[0]}")
    return 0


class _StopOnSignal:
    """Turns Ctrl-C and SIGTERM into a call of `stop`; a second one is immediate."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        self._stop()


def _new_folder(preset: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{preset}-{number:03d}").exists():
        number += 1
    return folder


def _sample(options: argparse.Namespace) -> int:
    _need_train_extra()
    if options.n < 1:
        raise UserError(f"--n: wanted a whole number >= 1, got {options.n}")
    import torch

    from gpkernels.training import checkpoint, models, pictures

    generator, config, step = checkpoint.load_generator(options.checkpoint)
    z = models.draw_z(config, options.n, torch.Generator().manual_seed(options.seed))
    with torch.no_grad():
        y = models.labels_in_turn(generator, options.n)
        labels = [None] * len(z) if y is None else y.split(256)
        images = torch.cat([generator(*part) for part in zip(z.split(256), labels, strict=False)])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_grid(options.out, images)
    print(f"{options.n} images of {config.preset} after step {step} -> {options.out}")
    return 0


def _presets(options: argparse.Namespace) -> int:
    _need_train_extra()
    from gpkernels.training import presets

    print("\n\n".join(map(presets.describe, presets.PRESETS)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from gpkernels import doctor

    return doctor.report()
