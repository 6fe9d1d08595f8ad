"""perturb in plain torch: the specification, and the backend for devices without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from gpkernels.ops import random
from gpkernels.ops._layout import accumulation_dtype

NOISES = ("normal", "uniform")
"""Names of the noises; a raw op takes the position."""

_DRAWS = (random.normal, random.uniform_symmetric)


def _noise(like: Tensor, noise: int, seed: Tensor) -> Tensor:
    numbers = random.in_memory_order(_DRAWS[noise](seed, like.numel()), like)
    return numbers.to(accumulation_dtype(like.dtype))


def perturb(real: Tensor, sigma: Tensor | None, scale: float, noise: int, seed: Tensor) -> Tensor:
    factor = scale if sigma is None else scale * sigma
    return (real + factor * _noise(real, noise, seed)).to(real.dtype)


def perturb_backward(grad_out: Tensor, scale: float, noise: int, seed: Tensor) -> Tensor:
    """The gradient in sigma: scale <grad_out, noise>. Shape (), accumulation dtype."""
    return scale * (grad_out * _noise(grad_out, noise, seed)).sum()


def std(real: Tensor) -> Tensor:
    """The standard deviation of all elements (population), 0 with derivative 0 where they are all equal."""
    real = real.to(accumulation_dtype(real.dtype))
    if not real.requires_grad:
        return torch.std(real, correction=0)
    variance = torch.var(real, correction=0)
    positive = variance > 0
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
