"""Checkpoints: a folder for a step, in checkpoints/ of the run folder; each is whole, or it is refused.

    checkpoints/step_00001234/
        generator.safetensors   ema.safetensors   critic.safetensors
        training.pt      what else a run goes on with, for torch.load(weights_only=True): optimizers, random states, ...
        manifest.json    format, step, config, what the images are; size and sha256 of each file, and its own sha256
    checkpoints/newest   a link to the newest, where the file system has links

A checkpoint is written beside as step_*.tmp, synced to the disk and renamed; another one of the same step moves to
*.old first, and the oldest are deleted last. So a run that is killed at any moment leaves its last checkpoint whole.
The digests tell damage and careless changes; they are no signature against someone who computes them anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpkernels._version import __version__
from gpkernels.errors import UserError
from gpkernels.training import disk, models
from gpkernels.training.config import TrainConfig

FORMAT = 2
NAME = "checkpoints"
NEWEST = "newest"
MANIFEST = "manifest.json"
TRAINING = "training.pt"
NETS = ("generator", "ema", "critic")
_ABOUT = ("step", "config", "channels", "size", "classes", "images")
_OTHERS = "not tensors"
_UNREADABLE = (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)
_HALF_WRITTEN = (
    *(f"{NAME}/step_[0-9]*.tmp", f"{NAME}/{NEWEST}.tmp", "samples/epoch_[0-9]*.png.tmp"),
    *("config.json.tmp", "sessions.json.tmp", "trackers.json.tmp", "curves.png.tmp", "report.html.tmp"),
    "diverged.pt.tmp",
)
"""What a run that was killed may leave of its own."""
_STEP = re.compile(r"step_(\d{8,})(\.old)?")
_WANTED = f"checkpoint: wanted a run folder or a checkpoint in its {NAME}/"
Found = TypeVar("Found")


class Damaged(UserError):
    """A checkpoint that is not what was saved."""


def save(run: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes `state` as a checkpoint of the run folder `run`. Of those up to its step, the last `keep` stay.

    Returns its folder. `state` is a `Trainer.state_dict()`, on any device. Raises OSError; the checkpoints before it
    are then as they were.
    """
    folder = run / NAME
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{state['step']:08d}"
    temporary, old = final.with_suffix(".tmp"), final.with_suffix(".old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        files = {}
        for name, content in _contents(state):
            disk.write(temporary / name, content)
            files[name] = _fingerprint(content)
        manifest = {
            "format": FORMAT,
            "versions": {"gpkernels": __version__, "torch": torch.__version__},
            **{name: state[name] for name in _ABOUT},
            "files": files,
        }
        sealed = {**manifest, "sha256": _seal(manifest)}
        disk.write(temporary / MANIFEST, (json.dumps(sealed, indent=2) + "\n").encode())
        disk.sync(temporary)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    disk.sync(folder)
    disk.link(folder / NEWEST, final.name)
    past = [path for path in held(run) if step_of(path) <= state["step"]]
    for path in [path for path in past if path.suffix != ".old"][keep:] + [path for path in past if path.suffix]:
        disk.delete(path)
    return final


def held(run: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first, damaged ones too."""
    folder = run / NAME
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path), path.suffix != ".old"), reverse=True)


def step_of(path: Path) -> int:
    """The step of a checkpoint that `held` gives."""
    return int(path.stem.removeprefix("step_"))


def check_unused(run: Path) -> None:
    """Raises UserError if a run has begun in the folder `run`."""
    if held(run):
        raise UserError(f"--out: {run} already holds a run; --resume goes on with it")


def begin(run: Path, step: int) -> None:
    """Makes way for a run that goes on after `step`, in a folder that no other run uses.

    What a killed run left half written is deleted; checkpoints of later steps, which are damaged or belong to a future
    that is now given up, are renamed to *.aside, which nothing reads or deletes.
    """
    for path in [path for pattern in _HALF_WRITTEN for path in run.glob(pattern)]:
        disk.delete(path)
    for path in [path for path in held(run) if step_of(path) > step]:
        aside = path.with_name(f"{path.name}.aside")
        disk.delete(aside)
        path.rename(aside)
        say(f"{path} is of a later step than {step}, where this run goes on: renamed to {aside.name}")
    if held(run):
        disk.link(run / NAME / NEWEST, held(run)[0].name)


def load(path: Path) -> dict[str, Any]:
    """The state saved in a checkpoint, on the CPU; of a run folder the newest that is whole.

    Raises UserError if it is damaged, of another format or none. Where a run's newest one is damaged, says so on stderr
    and takes the one before it.
    """
    return _first_whole(path, _read)


def load_generator(path: Path, generator: nn.Module | None = None) -> tuple[Any, TrainConfig, int]:
    """The averaged generator of a checkpoint in eval mode, its config, and the step it was saved at; as `load`.

    `generator` is wanted where the run was given one: a module of the same class, which gets the weights.
    """
    state = load(path)
    config = TrainConfig.from_dict(state["config"])
    given = state.get("given", {}).get("generator")
    if given is not None and generator is None:
        raise UserError(
            f"checkpoint: the run's generator is {given} of its program: wanted it, got none, as the commands cannot; "
            "in Python, checkpoint.load_generator takes generator="
        )
    if given is None and generator is not None:
        raise UserError(
            f"checkpoint: its generator is the one its config names: wanted none, got {type(generator).__name__}"
        )
    if generator is None:
        generator, _ = models.build(config, state["channels"], state["size"], state["classes"])
    load_weights(generator, state["ema"], "generator")
    return generator.eval(), config, state["step"]


def find(path: Path) -> Path:
    """The folder of the checkpoint that `load` would load."""
    return _first_whole(path, lambda folder: (folder, _read(folder)))[0]


def digest(folder: Path, net: str) -> str:
    """sha256 of a net's file in a checkpoint, in hexadecimal, as its manifest has it."""
    return _manifest(folder)["files"][f"{net}.safetensors"]["sha256"]


def images(folder: Path) -> dict[str, Any] | None:
    """`ImageSet.about` of the images that a checkpoint was trained on; None for one that has not kept it."""
    return _manifest(folder).get("images")


def run_folder(path: Path) -> Path:
    """The run folder of a checkpoint; where the checkpoint was copied elsewhere, the folder that it lies in."""
    return path.parent.parent if path.parent.name == NAME else path.parent


def load_weights(module: nn.Module, weights: dict[str, Any], name: str) -> None:
    """Loads `weights` into `module`. Raises UserError if they are of another architecture."""
    wanted, got = (
        {key: tuple(value.shape) if isinstance(value, Tensor) else () for key, value in state.items()}
        for state in (module.state_dict(), weights)
    )
    if wanted != got:
        key = sorted(set(wanted.items()) ^ set(got.items()))[0][0]
        raise UserError(
            f"checkpoint: its {name} is of another architecture than its config "
            f"({key}: wanted {wanted.get(key, 'no such tensor')}, got {got.get(key, 'no such tensor')})"
        )
    module.load_state_dict(weights)


def say(text: str) -> None:
    print(f"gpkernels: {text}", file=sys.stderr, flush=True)


def _contents(state: dict[str, Any]) -> Iterator[tuple[str, memoryview]]:
    """File names and contents, one in memory at a time. What is no tensor in a net's state lies in training.pt."""
    import safetensors.torch

    training = {name: value for name, value in state.items() if name not in (*NETS, *_ABOUT)}
    training[_OTHERS] = {
        net: {name: value for name, value in state[net].items() if not isinstance(value, Tensor)} for net in NETS
    }
    for net in NETS:
        tensors = {  # tensors of their own, since safetensors takes none that share memory
            name: value.detach().clone(memory_format=torch.contiguous_format).cpu()
            for name, value in state[net].items()
            if isinstance(value, Tensor)
        }
        yield f"{net}.safetensors", memoryview(safetensors.torch.save(tensors, {"format": "pt"}))
    buffer = io.BytesIO()
    torch.save(training, buffer)
    yield TRAINING, buffer.getbuffer()


def _read(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint's folder."""
    import safetensors
    import safetensors.torch

    manifest = _manifest(folder)
    contents = {name: _verified(folder, name, wanted) for name, wanted in manifest["files"].items()}
    try:
        training = torch.load(io.BytesIO(contents[TRAINING]), map_location="cpu", weights_only=True)
        others = training.pop(_OTHERS)
        nets = {net: {**safetensors.torch.load(contents[f"{net}.safetensors"]), **others[net]} for net in NETS}
    except (*_UNREADABLE, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"checkpoint: {folder} is damaged: its tensors cannot be read ({reason[:120]})") from None
    return {**{name: manifest.get(name) for name in _ABOUT}, **nets, **training}


def _verified(folder: Path, name: str, wanted: dict[str, Any]) -> bytes:
    """The content of a file, if it is what the manifest wants."""
    content = _content(folder / name)
    got = _fingerprint(content)
    if got["bytes"] != wanted["bytes"]:
        raise Damaged(f"checkpoint: {folder} is damaged: {name} has {got['bytes']} bytes, not {wanted['bytes']}")
    if got["sha256"] != wanted["sha256"]:
        raise Damaged(f"checkpoint: {folder} is damaged: {name} is not what was saved (its sha256 differs)")
    return content


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_content(folder / MANIFEST))
    except ValueError:
        raise Damaged(f"checkpoint: {folder} is damaged: {MANIFEST} is not JSON") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _seal(manifest):
        raise Damaged(f"checkpoint: {folder} is damaged: {MANIFEST} is not what was saved (its sha256 differs)")
    if manifest["format"] != FORMAT:
        raise UserError(f"checkpoint: {folder} is of format {manifest['format']}, this version reads {FORMAT}")
    return manifest


def _first_whole(path: Path, read: Callable[[Path], Found]) -> Found:
    """`read` of the checkpoint `path`, or of the newest one in the run folder `path` that is not damaged."""
    if not (path / NAME).is_dir():
        if not path.exists():
            raise UserError(f"{_WANTED}, got {path}, which does not exist")
        if not path.is_dir():
            raise UserError(f"{_WANTED}, got {path}, which is a file")
        if not _STEP.fullmatch(path.resolve().name) and not (path / MANIFEST).is_file():
            raise UserError(f"{_WANTED}, got {path}, which holds neither {NAME}/ nor {MANIFEST}")
        return read(path)
    damaged: list[str] = []
    for folder in held(path):
        try:
            found = read(folder)
        except Damaged as error:
            if not folder.is_dir():  # its run has just deleted it, for a newer one
                return _first_whole(path, read)
            damaged.append(str(error))
            continue
        for message in damaged:
            say(f"{message}; {folder.name}, the one before it, is used")
        return found
    raise UserError("; ".join(damaged) or f"{_WANTED}, got {path}, which holds none")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"checkpoint: {path.parent} is damaged: it has no {path.name}") from None


def _fingerprint(content: bytes | memoryview) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
