"""Tensors as the kernels want them: weights contiguous, without a copy where they are dense in another order
(channels_last), and u and v of a group as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """`order`: the dimensions from the outermost in memory inwards; None for a weight taken as it is."""

    shape: tuple[int, ...]
    dim: int
    order: tuple[int, ...] | None

    @property
    def kernel_dim(self) -> int:
        return self.dim if self.order is None else self.order.index(self.dim)

    def arrange(self, weight: Tensor) -> Tensor:
        return weight if self.order is None else weight.permute(self.order)

    def restore(self, weight: Tensor) -> Tensor:
        return weight if self.order is None else weight.permute([self.order.index(d) for d in range(len(self.shape))])

    def arrange_v(self, v: Tensor) -> Tensor:
        """v with its elements in the order of the arranged weight's columns; itself where that is its own."""
        if self.order is None:
            return v
        own, arranged = self._columns()
        return v if own == arranged else self._moved(v, own, arranged)

    def restore_v(self, v: Tensor) -> Tensor:
        if self.order is None:
            return v
        own, arranged = self._columns()
        return v if own == arranged else self._moved(v, arranged, own)

    def _columns(self) -> tuple[list[int], list[int]]:
        own = [d for d in range(len(self.shape)) if d != self.dim]
        return own, [d for d in self.order or () if d != self.dim]

    def _moved(self, v: Tensor, source: list[int], wanted: list[int]) -> Tensor:
        return v.view([self.shape[d] for d in source]).permute([source.index(d) for d in wanted]).reshape(-1)


def layout(weight: Tensor, dim: int) -> Layout:
    shape = tuple(weight.shape)
    if weight.is_contiguous():
        return Layout(shape, dim, None)
    strides = weight.stride()
    order = tuple(sorted(range(len(shape)), key=lambda d: -strides[d]))
    return Layout(shape, dim, order if weight.permute(order).is_contiguous() else None)


def layouts(weights: Sequence[Tensor], dims: Sequence[int]) -> list[Layout] | None:
    """None where every weight is contiguous."""
    if all(w.is_contiguous() for w in weights):
        return None
    return [layout(w, d) for w, d in zip(weights, dims, strict=True)]


_UNIT = 4
"""Elements: in `vectors` u and v of every layer begin at multiples of it, so that a GPU can read them in units."""


def padded(size: int) -> int:
    """Elements that a vector takes there."""
    return -(-size // _UNIT) * _UNIT


def _sizes(weights: Sequence[Tensor], dims: Sequence[int]) -> list[int]:
    """Of u and v of the first layer, of the second, and so on."""
    rows = [w.shape[d] for w, d in zip(weights, dims, strict=True)]
    return [n for w, r in zip(weights, rows, strict=True) for n in (r, w.numel() // r)]


def vectors_size(weights: Sequence[Tensor], dims: Sequence[int]) -> int:
    return sum(map(padded, _sizes(weights, dims)))


def pack(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """Copies of u and v of all layers, in one tensor: `vectors`."""
    parts = []
    for x in (x for pair in zip(u, v, strict=True) for x in pair):
        missing = padded(x.numel()) - x.numel()
        parts += [x, x[:missing]] if missing <= x.numel() else [x, *[x[:1]] * missing]  # whatever there is
    return torch.cat(parts)


def unpack(vectors: Tensor, weights: Sequence[Tensor], dims: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """u and v of every layer, as views."""
    sizes = _sizes(weights, dims)
    parts = vectors.split([padded(n) for n in sizes])
    found = [part[:n] for part, n in zip(parts, sizes, strict=True)]
    return found[::2], found[1::2]
