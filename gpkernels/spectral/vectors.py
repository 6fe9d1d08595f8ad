"""u and v outside the buffers: copies, unit lengths, whether they belong to their weights, and new ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.spectral_norm.autograd import Sigmas, groups_of, spectral_iterate

START = 15
"""Iterations that new vectors get, as in torch."""


def units(vectors: list[Tensor]) -> list[Tensor]:
    """The vectors at length 1, to the bit as they are where they have it already; a zero vector stays. New tensors."""
    first = vectors[0]
    if len(vectors) == 1:  # without _foreach, for which transforms have no rules
        return [first / _divisors(torch.linalg.vector_norm(first))]
    if any(x.dtype != first.dtype or x.device != first.device for x in vectors):
        return [unit for x in vectors for unit in units([x])]
    lengths = torch.stack(torch._foreach_norm(vectors))
    return list(torch._foreach_div(vectors, _divisors(lengths).unbind()))


def _divisors(lengths: Tensor) -> Tensor:
    return torch.where(((lengths - 1).abs() < 1e-5) | (lengths == 0), 1.0, lengths)


def copies(vectors: list[Tensor]) -> list[Tensor]:
    """Copies, made in one call."""
    first = vectors[0]
    if first.is_cuda or any(x.dtype != first.dtype or x.device != first.device for x in vectors):
        return list(torch._foreach_mul(vectors, 1.0))  # aligned each, as the kernels like them
    return list(torch.cat(vectors).split([x.numel() for x in vectors]))


def start(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Random unit vectors that depend on the weight's shape and dtype alone: equal on all ranks."""
    rows = weight.shape[dim]
    dtype, generator = accumulation_dtype(weight.dtype), torch.Generator().manual_seed(0)
    u, v = (
        torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        for size in (rows, weight.numel() // rows)
    )
    return (u / u.norm()).to(weight.device, dtype), (v / v.norm()).to(weight.device, dtype)


def fresh(weights: Sequence[Tensor], dims: Sequence[int], eps: float) -> tuple[list[Tensor], list[Tensor]]:
    """u and v as functions of the weights: `start` and 15 iterations."""
    u, v = map(list, zip(*(start(w, d) for w, d in zip(weights, dims, strict=True)), strict=True))
    spectral_iterate(weights, u, v, dims, START, eps)
    return u, v


def misfits(
    weights: Sequence[Tensor], u: list[Tensor], v: list[Tensor], dims: Sequence[int], eps: float, sigmas: Sigmas
) -> list[int]:
    """The layers whose u and v do not belong to the weight, by sigma = u . (W v). Waits for a GPU.

    After an iteration u is the direction of W v, and another one adds little to sigma: where sigma is below 0.9 |W v|,
    or below half of what another iteration gives, the vectors are those of another weight."""
    none = list(torch._foreach_mul(u, 0.0))  # W^T 0 leaves v as it is
    images = spectral_iterate(weights, none, copies(v), dims, 1, eps)
    further = spectral_iterate(weights, copies(u), copies(v), dims, 1, eps)
    found = []
    for indices, s, image, more in zip(groups_of(weights), sigmas, images, further, strict=True):
        fits = ((s >= 0.9 * image) & (s >= 0.5 * more)).tolist()
        found += [i for i, fit in zip(indices, fits, strict=True) if not fit]
    return found
