"""Aligned CelebA as torchvision lays it out: img_align_celeba, list_eval_partition.txt, list_attr_celeba.txt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig
from gpkernels.training.data.files import centre_square, decode, what_is
from gpkernels.training.data.image_set import ImageSet

SIZE = (178, 218)
BOXES = {
    "178": (0, 20, 178, 198),
    "148": (15, 35, 163, 183),
    "140": (19, 39, 159, 179),
    "128": (25, 57, 153, 185),
    "108": (35, 55, 143, 163),
}
"""Left, upper, right, lower of the crops in use for aligned CelebA; 178 is the LS-GAN-PG code's."""


def load(config: TrainConfig, path: Path, progress: Callable[[int, int], None]) -> ImageSet:
    """The part of the data that `config.split` names, in the order of the files' names, cropped as `config.crop` says.

    With `config.label_attribute` the label is 1 where the image has it, else 0. The test part is held out, unless it
    is trained on.
    """
    if not path.is_dir():
        raise UserError(f"--data celeba: wanted a folder, got {path}, which {what_is(path)}")
    roots = [root for root in (path, path / "celeba") if (root / "img_align_celeba").is_dir()]
    if not roots:
        raise UserError(f"--data celeba: wanted a folder img_align_celeba in {path} or {path / 'celeba'}, got none")
    root = roots[0]
    files = sorted((root / "img_align_celeba").glob("*.jpg"))
    if not files:
        raise UserError(f"--data celeba: wanted .jpg files in {root / 'img_align_celeba'}, got none")
    _check_attributes(root / "list_attr_celeba.txt", len(files))
    if config.split != "all":
        chosen = _partition(root / "list_eval_partition.txt", config.split)
        files = [file for file in files if file.name in chosen]
        if not files:
            raise UserError(f"--split {config.split}: wanted images of that part in {root}, got none")

    def crop(image: Image.Image) -> Image.Image:
        if config.crop == "none":
            return centre_square(image)
        if image.size != SIZE:
            raise ValueError(f"wanted {SIZE[0]}x{SIZE[1]} pixels, got {image.width}x{image.height}")
        return image.crop(BOXES[config.crop])

    labels: list[int] | None = None
    class_names: tuple[str, ...] = ()
    if config.label_attribute is not None:
        labels = _labels(root / "list_attr_celeba.txt", config.label_attribute, files)
        class_names = (f"not {config.label_attribute}", config.label_attribute)
    images = decode(config, "celeba", files, crop, progress, labels, class_names)
    if config.split in ("train", "valid"):
        test = dataclasses.replace(config, split="test", max_images=None)
        images.load_held_out = lambda: load(test, path, lambda done, total: None)
    return images


def _check_attributes(file: Path, images: int) -> None:
    """The attribute file, where there is one, speaks of the images that are there."""
    if not file.is_file():
        return
    stated, _, rows = _attributes(file)
    if not stated.isdigit() or int(stated) != len(rows) or len(rows) != images:
        raise UserError(
            f"--data celeba: wanted one count in {file.name}, its rows and img_align_celeba, "
            f"got {stated!r} stated, {len(rows)} rows and {images} images"
        )


def _attributes(file: Path) -> tuple[str, list[str], list[list[str]]]:
    """The count that the file states, the names of its attributes, and its rows: file name, then 1 or -1 for each."""
    lines = file.read_text(errors="replace").splitlines()
    stated = lines[0].strip() if lines else ""
    return stated, lines[1].split() if lines[1:] else [], [row for line in lines[2:] if (row := line.split())]


def _labels(file: Path, attribute: str, images: Sequence[Path]) -> list[int]:
    """1 for the images that have the attribute, 0 for the others, by their names."""
    if not file.is_file():
        raise UserError(f"--label-attribute: wanted {file}, which is missing")
    _, names, rows = _attributes(file)
    if attribute not in names:
        raise UserError(f"--label-attribute: wanted one of {', '.join(names)}, got {attribute!r}")
    column = names.index(attribute) + 1
    values: dict[str, str] = {}
    for row in rows:
        if len(row) != len(names) + 1 or row[column] not in ("1", "-1"):
            raise UserError(
                f"--label-attribute: wanted a name and {len(names)} times 1 or -1 in the rows of {file}, "
                f"got {' '.join(row)[:60]!r}"
            )
        values[row[0]] = row[column]
    missing = [image.name for image in images if image.name not in values]
    if missing:
        raise UserError(f"--label-attribute: wanted a row for each image in {file}, got none for {missing[0]}")
    return [int(values[image.name] == "1") for image in images]


def _partition(file: Path, split: str) -> set[str]:
    if not file.is_file():
        raise UserError(f"--split {split}: wanted {file}, which is missing (--split all uses every image)")
    code = {"train": "0", "valid": "1", "test": "2"}[split]
    rows = (line.split() for line in file.read_text(errors="replace").splitlines())
    return {row[0] for row in rows if len(row) == 2 and row[1] == code}
