"""Pooling: linear in x once a maximum's positions are known.

    Pool    y  = P x       to x: Unpool(g)
    Unpool  gx = P^T g     to g: Pool(t)       to x: nothing (None, where torch makes zeros)

For max pooling P picks the positions that the forward found, which travel with the Functions as a saved tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gpkernels.double_backward._nodes import Node, Recording, autocast_float32, records, reroutable
from gpkernels.ops._layout import layout_of

aten = torch.ops.aten


class LinearPool(Protocol):
    def apply(self, x: Tensor, indices: Tensor | None) -> Tensor: ...

    def adjoint(self, g: Tensor, like: Tensor, indices: Tensor | None) -> Tensor:
        """The gradient in x, for an x of the shape and layout of `like`, whose values are not read."""


@dataclass(frozen=True)
class Average:
    forward: Any  # aten.avg_poolNd
    backward: Any
    options: tuple[Any, ...]

    def apply(self, x: Tensor, indices: Tensor | None) -> Tensor:
        return self.forward(x, *self.options)

    def adjoint(self, g: Tensor, like: Tensor, indices: Tensor | None) -> Tensor:
        return self.backward(g, like, *self.options)


@dataclass(frozen=True)
class AdaptiveAverage:
    forward: Any  # aten._adaptive_avg_poolNd
    backward: Any  # which reads the output's size off g
    size: list[int]

    def apply(self, x: Tensor, indices: Tensor | None) -> Tensor:
        return self.forward(x, self.size)

    def adjoint(self, g: Tensor, like: Tensor, indices: Tensor | None) -> Tensor:
        return self.backward(g, like)


@dataclass(frozen=True)
class Maximum:
    backward: Any  # aten.max_poolNd_with_indices_backward, or of the adaptive ones
    options: tuple[Any, ...]
    dims: int

    def apply(self, x: Tensor, indices: Tensor | None) -> Tensor:
        assert indices is not None
        return x.flatten(-self.dims).gather(-1, indices.flatten(-self.dims)).view(indices.shape)

    def adjoint(self, g: Tensor, like: Tensor, indices: Tensor | None) -> Tensor:
        return self.backward(g, like, *self.options, indices)


class Pool(Node):
    """P x, which is `known` where the forward has been computed with the indices. Highest gradient order: any."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, pool: LinearPool, indices: Tensor | None, known: tuple[Tensor, ...] = ()
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.pool, ctx.shape, ctx.layout = pool, x.shape, layout_of(x)
        return known[0] if known else pool.apply(x, indices)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return None, None, None, None
        (indices,) = ctx.saved_tensors
        unpool = Unpool.apply if records(g) else _unpool
        return unpool(g, ctx.pool, indices, ctx.shape, ctx.layout), None, None, None


class Unpool(Node):
    """P^T g. Highest gradient order: any."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, pool: LinearPool, indices: Tensor | None, shape: torch.Size, layout: torch.memory_format
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices)
        ctx.pool = pool
        return _unpool(g, pool, indices, shape, layout)

    @staticmethod
    def backward(ctx: Any, t: Tensor | None) -> tuple[Any, ...]:
        if t is None:
            return None, None, None, None, None
        (indices,) = ctx.saved_tensors
        y = Pool.apply(t, ctx.pool, indices) if records(t) else ctx.pool.apply(t, indices)
        return y, None, None, None, None


def _unpool(
    g: Tensor, pool: LinearPool, indices: Tensor | None, shape: torch.Size, layout: torch.memory_format
) -> Tensor:
    like = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout)
    return pool.adjoint(g.contiguous(memory_format=layout), like, indices)


def average(dims: int) -> Any:
    """The row of avg_pool2d, avg_pool3d."""
    forward = getattr(aten, f"avg_pool{dims}d").default
    backward = getattr(aten, f"avg_pool{dims}d_backward").default

    def row(
        recording: Recording,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        if not reroutable(input) or input.dim() != dims + 2:
            return NotImplemented
        options = (*_window(kernel_size, stride, padding, dims), ceil_mode, count_include_pad, divisor_override)
        return Pool.apply(input, Average(forward, backward, options), None, ())

    return row


def adaptive_average(dims: int) -> Any:
    """The row of adaptive_avg_pool2d, adaptive_avg_pool3d. One output pixel is a mean, which torch knows."""
    forward = getattr(aten, f"_adaptive_avg_pool{dims}d").default
    backward = getattr(aten, f"_adaptive_avg_pool{dims}d_backward").default

    def row(recording: Recording, input: Tensor, output_size: Any) -> Any:
        if not reroutable(input) or input.dim() != dims + 2:
            return NotImplemented
        given = _list(output_size, dims)
        size = [input.shape[d - dims] if n is None else n for d, n in enumerate(given)]
        if all(n == 1 for n in size):
            return NotImplemented
        return Pool.apply(_cast(input, dims), AdaptiveAverage(forward, backward, size), None, ())

    return row


def maximum(dims: int) -> Any:
    """The row of max_pool2d, max_pool3d."""
    forward = getattr(aten, f"max_pool{dims}d_with_indices").default
    backward = getattr(aten, f"max_pool{dims}d_with_indices_backward").default

    def row(
        recording: Recording,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        if return_indices or not reroutable(input) or input.dim() != dims + 2:
            return NotImplemented
        options = (*_window(kernel_size, stride, padding, dims), _list(dilation, dims), ceil_mode)
        input = _cast(input, dims)
        with torch.no_grad():
            y, indices = forward(input, *options)
        return Pool.apply(input, Maximum(backward, options, dims), indices, (y,))

    return row


def _cast(x: Tensor, dims: int) -> Any:
    """As autocast does with the arguments of adaptive_avg_pool3d and max_pool3d, but not of what these call."""
    return autocast_float32(x, device="cpu")[0] if dims == 3 else x


_average2d, _adaptive_average2d, _maximum2d = average(2), adaptive_average(2), maximum(2)


def average1d(
    recording: Recording,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Any:
    """The row of avg_pool1d: avg_pool2d on an image of height 1."""
    window = _flat_window(kernel_size, stride, padding)
    return _on_height_one(input, _average2d, recording, *window, ceil_mode, count_include_pad)


def maximum1d(
    recording: Recording,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The row of max_pool1d: max_pool2d on an image of height 1."""
    window = _flat_window(kernel_size, stride, padding)
    spread = [1, *_list(dilation, 1)]
    return _on_height_one(input, _maximum2d, recording, *window, spread, ceil_mode, return_indices)


def adaptive_average1d(recording: Recording, input: Tensor, output_size: Any) -> Any:
    """The row of adaptive_avg_pool1d: adaptive_avg_pool2d on an image of height 1."""
    return _on_height_one(input, _adaptive_average2d, recording, [1, *_list(output_size, 1)])


def _flat_window(kernel_size: Any, stride: Any, padding: Any) -> tuple[list[Any], list[Any], list[Any]]:
    size, stride, padding = _window(kernel_size, stride, padding, 1)
    return [1, *size], [1, *stride], [0, *padding]


def _on_height_one(input: Tensor, row: Any, recording: Recording, *options: Any) -> Any:
    if not reroutable(input) or input.dim() != 3:
        return NotImplemented
    y = row(recording, input.unsqueeze(2), *options)
    return y if y is NotImplemented else y.squeeze(2)


def _window(kernel_size: Any, stride: Any, padding: Any, dims: int) -> tuple[list[Any], list[Any], list[Any]]:
    """The stride is the window's size where none is given: None or an empty tuple."""
    size = _list(kernel_size, dims)
    no_stride = stride is None or (hasattr(stride, "__iter__") and not list(stride))
    return size, size if no_stride else _list(stride, dims), _list(padding, dims)


def _list(value: Any, dims: int) -> list[Any]:
    if value is None:
        return [None] * dims
    values = list(value) if hasattr(value, "__iter__") else [int(value)]
    return values * dims if len(values) == 1 else values
