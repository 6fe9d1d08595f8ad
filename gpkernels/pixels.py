"""8-bit images as numbers in [-1, 1], and back."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1], clamped to that, as the nearest of the 8-bit values."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
