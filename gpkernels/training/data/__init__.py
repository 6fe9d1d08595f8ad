"""Image data sets as uint8: the embedded faces, Fashion-MNIST, any folder of images, CelebA, arrays of your own.

`load` returns an `ImageSet`; its `batch` and `batch_labels` cut a step's images and labels out of it. Which images,
mirrored and shifted how, and which labels are known, is a function of (seed, step) alone, so a resumed run sees exactly
the batches that an uninterrupted one would.

A folder, a zip or parquet shards are listed (folder, celeba: a `Listing`) and decoded (decoding): small ones into
memory, large ones once into a prepared file (prepared, sidecar) that is mapped into memory ever after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import celeba, decoding, fashion_mnist, folder, lfw, prepared, sidecar
from gpkernels.training.data.celeba import EmptyPart
from gpkernels.training.data.image_set import WHOLE, ImageSet, Shard, augment
from gpkernels.training.data.listing import Listing

__all__ = ["WHOLE", "ImageSet", "Shard", "augment", "load"]

_WITH_LABELS = "fashion-mnist, folder:PATH with a sub-folder a class, or celeba:PATH with --label-attribute"
LISTINGS: dict[str, Callable[[TrainConfig, Path], Listing]] = {"folder": folder.listing, "celeba": celeba.listing}
"""The kinds of data that are decoded, and what lists their images."""

Progress = Callable[[int, int], None]


def load(config: TrainConfig, progress: Progress = lambda done, total: None) -> ImageSet:
    """The data set that `config.data` names. Raises UserError, naming what is wrong.

    With a condition the data has labels, and images of every class.
    """
    images = _load(config, progress)
    images.loaded_as = config.data
    if config.condition == "none":
        return images
    if images.labels is None:
        raise UserError(f"--condition {config.condition}: wanted data with labels ({_WITH_LABELS}), got {config.data}")
    counts = np.bincount(images.labels, minlength=images.classes)
    if not counts.all():
        name = images.class_names[counts.argmin()]
        raise UserError(f"--condition {config.condition}: wanted images of every class, got none of {name!r}")
    images.known(config)
    return images


def of_others(trained_on: dict[str, Any], config: TrainConfig) -> str:
    """What to say of a model trained on `trained_on`, an `ImageSet.about`, where `config.data` names other images."""
    what = f"{trained_on['name']!r}, {trained_on['count']} images"
    given = f"images that a program gave it ({what}), not on {config.data}"
    changed = f"other images than {config.data} now holds ({what})"
    return f"trained on {given if trained_on['given'] else changed}: --data names the images to take"


def _load(config: TrainConfig, progress: Progress) -> ImageSet:
    kind, _, path = config.data.partition(":")
    if config.data == "lfw-mini":
        return lfw.load(config.image_size or 32)
    if kind == "fashion-mnist" and (path or config.data == kind):
        return fashion_mnist.load(config, Path(path) if path else None)
    if kind in LISTINGS and path:
        return _listed(config, kind, Path(path), progress)
    raise UserError(f"--data: wanted lfw-mini, fashion-mnist[:PATH], folder:PATH or celeba:PATH, got {config.data!r}")


def _listed(config: TrainConfig, kind: str, path: Path, progress: Progress) -> ImageSet:
    """From the prepared file where there is one, which is made first for a large source; else decoded now."""
    size = size_of(config)
    ready = None if path.exists() else prepared.find_without_source(config, size)
    if ready is None:
        listing = LISTINGS[kind](config, path)
        ready = prepared.find(config, listing, size)
        if ready is None and len(listing) * 3 * size * size >= prepared.AUTOMATIC:
            ready, _ = prepared.prepare(config, listing, size, progress)
        if ready is not None and ready.attributes is None and config.label_attribute is not None:
            listing.attributes()  # says what is wrong with them
    images = _in_memory(config, listing, size, progress) if ready is None else ready.images(config.label_attribute)
    test = test_part(config)
    if test is not None:
        images.load_held_out = lambda: _held_out(test, path)
    return images


def size_of(config: TrainConfig) -> int:
    """The side of images that are decoded, in pixels."""
    return config.image_size or 64


def test_part(config: TrainConfig) -> TrainConfig | None:
    """What loads the part that is held out from these settings; None where there is none, or it is trained on."""
    if not config.data.startswith("celeba:") or config.split not in ("train", "valid"):
        return None
    return dataclasses.replace(config, split="test", max_images=None)


def _held_out(test: TrainConfig, path: Path) -> ImageSet | None:
    if not path.exists() and prepared.find_without_source(test, size_of(test)) is None:
        return None
    try:
        return _listed(test, "celeba", path, lambda done, total: None)
    except EmptyPart:
        return None


def _in_memory(config: TrainConfig, listing: Listing, size: int, progress: Progress) -> ImageSet:
    labels, names = listing.labels, listing.class_names
    if config.label_attribute is not None:
        labels, names = sidecar.attribute_labels(listing.attributes(), config.label_attribute, listing.no_attributes)
    images = np.empty((len(listing), 3, size, size), np.uint8)

    def store(position: int, pixels: np.ndarray) -> None:
        images[position : position + len(pixels)] = pixels

    skipped: decoding.Skipped = []
    done, chunks = 0, listing.chunks()
    for number, bad in decoding.decode_chunks(listing, size, range(len(chunks)), store, decoding.jobs_here()):
        skipped += bad
        done += len(chunks[number])
        progress(done, len(listing))
    if skipped:
        skipped.sort()
        good = np.setdiff1d(np.arange(len(listing)), [position for position, _ in skipped])
        images, labels = images[good], None if labels is None else labels[good]
    if not len(images):
        raise decoding.nothing_readable(config.data, skipped)
    reasons = [*listing.source.refused, *(reason for _, reason in skipped)]
    return ImageSet(listing.name, images, skipped=reasons, labels=labels, class_names=names)
