"""Image data sets in memory as uint8: the embedded faces, Fashion-MNIST, any folder of images, CelebA.

`load` returns an `ImageSet`; its `batch` and `batch_labels` cut a step's images and labels out of it. Which images,
mirrored and shifted how, and which labels are known, is a function of (seed, step) alone, so a resumed run sees exactly
the batches that an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import celeba, fashion_mnist, folder, lfw
from gpkernels.training.data.image_set import WHOLE, ImageSet, Shard, augment

__all__ = ["WHOLE", "ImageSet", "Shard", "augment", "load"]

_WITH_LABELS = "fashion-mnist, folder:PATH with a sub-folder a class, or celeba:PATH with --label-attribute"


def load(config: TrainConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> ImageSet:
    """The data set that `config.data` names. Raises UserError, naming what is wrong.

    With a condition the data has labels, and images of every class.
    """
    images = _load(config, progress)
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


def _load(config: TrainConfig, progress: Callable[[int, int], None]) -> ImageSet:
    kind, _, path = config.data.partition(":")
    if config.data == "lfw-mini":
        return lfw.load(config.image_size or 32)
    if kind == "fashion-mnist" and (path or config.data == kind):
        return fashion_mnist.load(config, Path(path) if path else None)
    if kind == "folder" and path:
        return folder.load(config, Path(path), progress)
    if kind == "celeba" and path:
        return celeba.load(config, Path(path), progress)
    raise UserError(f"--data: wanted lfw-mini, fashion-mnist[:PATH], folder:PATH or celeba:PATH, got {config.data!r}")
