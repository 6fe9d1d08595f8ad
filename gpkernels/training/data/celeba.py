"""Aligned CelebA as people have it: folders as torchvision's or Kaggle's, parquet shards, a plain folder, a zip."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig
from gpkernels.training.data.annotations import Table, read_table
from gpkernels.training.data.listing import CENTRE, Attributes, Cut, Listing
from gpkernels.training.data.parquet import Parquet
from gpkernels.training.data.sources import Files, Source, Text, Zip, check_path, fingerprint, stem, suffix, text_file

SIZE = (178, 218)
BOXES = {
    "178": (0, 20, 178, 198),
    "148": (15, 35, 163, 183),
    "140": (19, 39, 159, 179),
    "128": (25, 57, 153, 185),
    "108": (35, 55, 143, 163),
}
"""Left, upper, right, lower of the crops in use for aligned CelebA; 178 is the LS-GAN-PG code's."""
OFFICIAL = {"train": range(1, 162_771), "valid": range(162_771, 182_638), "test": range(182_638, 202_600)}
"""The numbers of the images of each part, for a copy that is whole and has lost its partition file."""
_CODES = {"train": "0", "valid": "1", "test": "2"}
_FOLDERS = ("img_align_celeba/img_align_celeba", "img_align_celeba", "img_align_celeba_png")
_SUFFIXES = (".jpg", ".jpeg", ".png")
_ATTRIBUTES = ("list_attr_celeba.txt", "list_attr_celeba.csv")
_PARTITION = ("list_eval_partition.txt", "list_eval_partition.csv")
_OPTION = "--data celeba"


class EmptyPart(UserError):
    """The data has no image of the part that was asked for."""


@dataclass(frozen=True)
class _Found:
    """Images and the files that speak of them; `beside` is where such a file is said to be missing."""

    source: Source
    beside: Path
    attributes: Text | None = None
    partition: Text | None = None

    @property
    def stems(self) -> list[str]:
        return [stem(name) for name in self.source.names]


def listing(config: TrainConfig, path: Path) -> Listing:
    """The part of the data that `config.split` names, in the order of the files' names, cropped as `config.crop` says.

    Labels are the attributes', of which `config.label_attribute` chooses one. Raises UserError for what is missing,
    damaged or does not agree.
    """
    found = _find(path)
    source = found.source
    if not source.names:
        raise source.without_images(_OPTION, _SUFFIXES)
    members = _shards_of(source, config.split) if isinstance(source, Parquet) else _of_split(found, config.split)
    if not len(members):
        raise EmptyPart(f"--split {config.split}: wanted images of that part in {path}, got none")
    members = members[: config.max_images]
    texts = [text.stamp for text in (found.attributes, found.partition) if text is not None]
    return Listing(
        name="celeba",
        source=source,
        members=members,
        cut=CENTRE if config.crop == "none" else Cut(f"aligned {config.crop}", BOXES[config.crop], SIZE),
        stamp=fingerprint([*source.stamps(), *texts]),
        attributes=lambda: _attributes(found, members),
        no_attributes=str(found.beside / _ATTRIBUTES[0]),
    )


def _find(path: Path) -> _Found:
    check_path(_OPTION, path, also=".parquet")
    if path.suffix.lower() == ".zip" and path.is_file():
        return _in_zip(path)
    if path.is_file():
        return _Found(Parquet(path.parent, [path], _OPTION), path)
    roots = (path, path / "celeba")
    for root in roots:
        for name in _FOLDERS:
            images = Files(root / name, _SUFFIXES, below=False) if (root / name).is_dir() else None
            if images is not None and images.names:
                return _in_folder(images, root)
    for root in roots:
        if (root / "img_align_celeba.zip").is_file():
            return _in_zip(root / "img_align_celeba.zip")
    if shards := [shard for shard in path.rglob("*.parquet") if shard.is_file()]:
        aligned = [shard for shard in shards if "img_align" in str(shard.relative_to(path))]
        return _Found(Parquet(path, aligned or shards, _OPTION), path)
    images = Files(path, _SUFFIXES, below=False)
    if images.names:
        return _in_folder(images, path.parent)
    raise UserError(
        f"{_OPTION}: wanted img_align_celeba (a folder of images, or .zip) in {path} or {path / 'celeba'}, "
        f".parquet files below it, or images in it, got none of these"
    )


def _in_folder(images: Files, root: Path) -> _Found:
    def beside(names: tuple[str, ...]) -> Text | None:
        places = (root, images.where.parent, images.where)
        return next((text for place in places for name in names if (text := text_file(place / name))), None)

    return _Found(images, root, beside(_ATTRIBUTES), beside(_PARTITION))


def _in_zip(path: Path) -> _Found:
    archive = Zip(path, _OPTION)
    images = [name for name in archive.names if suffix(name) in _SUFFIXES]
    aligned = [name for name in images if "img_align_celeba" in posixpath.dirname(name)]
    archive.keep(aligned or images)

    def inside_or_beside(names: tuple[str, ...]) -> Text | None:
        for name in names:
            if text := archive.text(name) or text_file(path.parent / name):
                return text
        return None

    return _Found(archive, path.parent, inside_or_beside(_ATTRIBUTES), inside_or_beside(_PARTITION))


def _of_split(found: _Found, split: str) -> np.ndarray:
    """The images of a part, by the partition file, or by their numbers where all 202,599 are there."""
    stems = found.stems
    if split == "all":
        return np.arange(len(stems))
    if found.partition is None:
        missing = found.beside / _PARTITION[0]
        wanted = f"wanted {missing}, which is missing (--split all uses every image)"
        return _by_number(stems, split, f"--split {split}: {wanted}")
    table = read_table(found.partition, _OPTION, counted=False)
    table.check("a name and 0, 1 or 2", ("0", "1", "2"), width=1)
    chosen = {name for name, row in table.rows.items() if row[1] == _CODES[split]}
    return np.flatnonzero([name in chosen for name in stems])


def _by_number(stems: list[str], split: str, otherwise: str) -> np.ndarray:
    numbers = np.array([int(name) if name.isascii() and name.isdigit() else 0 for name in stems])
    if not np.array_equal(np.sort(numbers), np.arange(1, OFFICIAL["test"].stop)):
        raise UserError(otherwise)
    part = OFFICIAL[split]
    return np.flatnonzero((numbers >= part.start) & (numbers < part.stop))


def _shards_of(source: Parquet, split: str) -> np.ndarray:
    if split == "all":
        return np.arange(len(source.names))
    parts = source.splits()
    if parts is None:
        raise UserError(
            f"--split {split}: wanted shards whose names, or folders, begin with train, valid or test in "
            f"{source.where}, got {source.shards[0].name} (--split all uses every image)"
        )
    return np.flatnonzero(parts == split)


def _attributes(found: _Found, members: np.ndarray) -> Attributes | None:
    if isinstance(found.source, Parquet):
        names, values = found.source.booleans()
        return Attributes(names, values[members]) if names else None
    if found.attributes is None:
        return None
    table = read_table(found.attributes, _OPTION, counted=True)
    _check_count(table)
    table.check(f"a name and {len(table.names)} times 1 or -1", ("1", "-1"), width=len(table.names))
    stems = found.stems
    chosen = [stems[member] for member in members]
    for member, name in zip(members, chosen, strict=True):
        if name not in table.rows:
            file = posixpath.basename(found.source.names[member])
            raise UserError(f"{_OPTION}: wanted a row for each image in {table.where}, got none for {file}")
    values = np.fromiter((value == "1" for name in chosen for value in table.rows[name][1:]), bool)
    return Attributes(table.names, values.reshape(len(chosen), -1))


def _check_count(table: Table) -> None:
    """The attribute file is whole. Its rows may be more than the images that are there."""
    if table.stated not in (None, str(len(table.rows))):
        raise UserError(
            f"{_OPTION}: wanted as many rows as it states in {table.where}, got {table.stated!r} stated and "
            f"{len(table.rows)} rows"
        )
