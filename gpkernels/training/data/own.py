"""Checks and conversions of images that a program brings itself: arrays, or a torch map-style data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpkernels._checks import fail

_CHANNELS = (1, 3)


def pixels(images: Any) -> np.ndarray:
    """uint8 images of (N, C, H, W) or (N, H, W, C), C 1 or 3, H = W, as a contiguous (N, C, H, W)."""
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    if not isinstance(images, np.ndarray):
        raise TypeError(f"images: wanted a numpy array or a torch.Tensor, got {type(images).__name__}")
    if images.dtype != np.uint8:
        raise TypeError(f"images: wanted uint8, got {images.dtype}")
    wanted = "(N, C, S, S) or (N, S, S, C) with C 1 or 3 and N at least 1"
    if images.ndim != 4 or not images.size:
        raise fail("images", wanted, f"shape {images.shape}")
    first = images.shape[1] in _CHANNELS and images.shape[2] == images.shape[3]
    last = images.shape[3] in _CHANNELS and images.shape[1] == images.shape[2]
    if first == last:
        what = f"shape {images.shape}" + (", which may be either" if first else "")
        raise fail("images", wanted, what)
    return np.ascontiguousarray(images if first else images.transpose(0, 3, 1, 2))


def labelled(labels: Any, class_names: Sequence[str], count: int) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Whole numbers from 0 on, one for each of `count` images, as int64, and a name for each class.

    Without names the classes are called "0", "1", ...
    """
    if labels is None:
        if class_names:
            raise fail("class_names", "none, since there are no labels", class_names)
        return None, ()
    array = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels: wanted whole numbers, got {array.dtype}")
    if array.shape != (count,):
        raise fail("labels", f"shape ({count},), one for each image", f"shape {array.shape}")
    names = tuple(class_names) or tuple(map(str, range(int(array.max()) + 1)))
    if array.min() < 0 or array.max() >= len(names):
        raise fail("labels", f"numbers from 0 to {len(names) - 1}", f"{array.min()} to {array.max()}")
    return array.astype(np.int64), names


def gather(dataset: Any, progress: Callable[[int, int], None]) -> tuple[np.ndarray, list[int] | None]:
    """Every item of a data set, in order: images as uint8 (N, C, S, S), and labels if items are (image, label).

    Raises TypeError for what has no length or is no image, ValueError for an item that is unlike the first.
    """
    try:
        count = len(dataset)
    except TypeError:
        raise TypeError(f"dataset: wanted a map-style data set with a length, got {type(dataset).__name__}") from None
    if count < 1:
        raise fail("dataset", "at least one item", count)
    found: np.ndarray | None = None
    labels: list[int] = []
    for index in range(count):
        item = dataset[index]
        image, label = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else (item, None)
        one = _picture(f"dataset[{index}]", image)
        if found is None:
            found = np.empty((count, *one.shape), np.uint8)
        if one.shape != found.shape[1:]:
            raise fail(f"dataset[{index}]", f"an image of {found.shape[1:]}, as the first", one.shape)
        if len(labels) != (index if label is not None else 0):
            raise fail(f"dataset[{index}]", "a label with every image or with none", label)
        found[index] = one
        if label is not None:
            labels.append(_label(f"dataset[{index}]", label))
        progress(index + 1, count)
    assert found is not None
    return found, labels or None


def _label(name: str, label: Any) -> int:
    value = label.item() if isinstance(label, (torch.Tensor, np.generic)) else label
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted a whole number as label, got {type(label).__name__}")
    return value


def _picture(name: str, image: Any) -> np.ndarray:
    """(C, S, S), uint8, of a PIL image, a uint8 array or tensor, or a floating-point one in [0, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "uf":
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"{name}: wanted a PIL image, or a uint8 or floating-point array or tensor, got {kind}")
    if image.dtype.kind == "f":
        low, high = image.min(initial=1), image.max(initial=0)
        if not (low >= 0 and high <= 1):  # false for NaN as well
            raise fail(name, "floating-point values in [0, 1] (leave out Normalize)", f"{low:g} to {high:g}")
        image = np.round(image * 255).astype(np.uint8)
    image = image[None] if image.ndim == 2 else image
    try:
        return pixels(image[None])[0]
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("images:", f"{name}:", 1)) from None
