"""Image batches as the metrics hold them: 8-bit, (N, C, H, W), C 1 or 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkernels._checks import fail
from gpkernels.pixels import to_uint8

_SLACK = 1e-3


def to_bytes(name: str, images: Any) -> Tensor:
    """Images of (N, C, H, W), uint8 or floating point in [-1, 1], as uint8 on the CPU.

    Generated images are rounded to the 8 bits that real ones have. Raises TypeError for what is no such tensor,
    ValueError for shapes, values beyond [-1, 1] and values that are not finite.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise TypeError(f"{name}: wanted uint8 or floating-point images, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise fail(name, "images of shape (N, 1 or 3, H, W)", f"shape {tuple(images.shape)}")
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    low, high = images.min().item(), images.max().item()
    if not (low >= -1 - _SLACK and high <= 1 + _SLACK):  # false for NaN as well
        raise fail(name, "finite values in [-1, 1]", f"values from {low:g} to {high:g}")
    return to_uint8(images)


def rgb(images: Tensor) -> Tensor:
    """Grey images repeated to three channels."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
