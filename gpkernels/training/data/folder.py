"""Any folder of images; the sub-folders of its first level are classes where every image lies in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig
from gpkernels.training.data.files import SUFFIXES, centre_square, decode, what_is
from gpkernels.training.data.image_set import ImageSet


def load(config: TrainConfig, path: Path, progress: Callable[[int, int], None]) -> ImageSet:
    """Every image below `path`, in the order of their paths. Classes are numbered in the order of their names."""
    if not path.is_dir():
        raise UserError(f"--data folder: wanted a folder, got {path}, which {what_is(path)}")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"--data folder: wanted images ({', '.join(SUFFIXES)}) in {path}, got none")
    parts = [file.relative_to(path).parts for file in files]
    names = tuple(sorted({part[0] for part in parts}))
    if len(names) < 2 or min(map(len, parts)) < 2:
        return decode(config, path.name, files, centre_square, progress)
    numbers = {name: number for number, name in enumerate(names)}
    return decode(config, path.name, files, centre_square, progress, [numbers[part[0]] for part in parts], names)
