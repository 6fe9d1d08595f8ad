"""A weight as the kernels want it: contiguous, without a copy where it is dense in another order (channels_last)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
