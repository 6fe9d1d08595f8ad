"""Convolutions and linear maps: y = w * x + b, bilinear in x and w.

The three partial derivatives of the trilinear form <g, w * x> are the three Functions here, and each one's derivatives
are the other two, so every order is exact with no zero stream:

    Apply     y  = w * x + b      to x: ToInput(g, w)    to w: ToWeight(g, x)    to b: the sum of g
    ToInput   gx = w^T g          to g: Apply(t, w)      to w: ToWeight(g, t)
    ToWeight  gw = g x^T          to g: Apply(x, t)      to x: ToInput(g, t)

While `sharing` runs, ToInput also carries the gradients of a loss whose adjoint is s_b g per sample: its weight
gradient becomes ToWeight(g, t + s x), one convolution for loss and penalty, and the bias's is sum s g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.double_backward._nodes import Node, Recording, autocast, records, reroutable, wants
from gpkernels.ops.conv2d_input_gradient import conv2d_input_gradient, wins

aten = torch.ops.aten


class BilinearMap(Protocol):
    to_input_takes_x: ClassVar[bool]

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor: ...

    def to_input(self, g: Tensor, w: Tensor, x: Tensor | None) -> Tensor:
        """The gradient in x, of which only shape and layout are used; None will do unless `to_input_takes_x`."""

    def to_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The gradient in w, of which only shape and layout are used."""

    def to_bias(self, g: Tensor, seeds: Tensor | None = None) -> Tensor:
        """The gradient in b; with `seeds` of shape (B,) each sample's share counts that often."""


@dataclass(frozen=True)
class Convolution(BilinearMap):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    to_input_takes_x = True

    @property
    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups

    @property
    def _is_plain(self) -> bool:
        return not self.transposed and self.groups == 1 and max(self.dilation) == 1

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return aten.convolution(x, w, b, *self._options)

    def to_input(self, g: Tensor, w: Tensor, x: Tensor | None) -> Tensor:
        assert x is not None
        if self._is_plain and wins(g, w, x, self.stride):
            return conv2d_input_gradient(g, w, x, self.stride, self.padding)
        return aten.convolution_backward(g, x, w, None, *self._options, (True, False, False))[0]

    def to_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        if w.shape[0] == 1:  # whose strides in channels_last torch's float64 kernel refuses
            w = w.contiguous()
        return aten.convolution_backward(g, x, w, None, *self._options, (False, True, False))[1]

    def to_bias(self, g: Tensor, seeds: Tensor | None = None) -> Tensor:
        pixels = tuple(range(2, g.dim()))
        return g.sum((0, *pixels)) if seeds is None else g.sum(pixels).mT.mv(seeds.to(g.dtype))


@dataclass(frozen=True)
class Linear(BilinearMap):
    to_input_takes_x = False

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, w, b)

    def to_input(self, g: Tensor, w: Tensor, x: Tensor | None) -> Tensor:
        return g.matmul(w)

    def to_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return _rows(g).mT.mm(_rows(x))

    def to_bias(self, g: Tensor, seeds: Tensor | None = None) -> Tensor:
        if seeds is None:
            return _rows(g).sum(0)
        return (g if g.dim() == 2 else g.flatten(1, -2).sum(1)).mT.mv(seeds.to(g.dtype))


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])  # -1 would be unknown for no features


class Apply(Node):
    """map.apply(x, w, b). Highest gradient order: any."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, map: BilinearMap, recording: Recording | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or map.to_input_takes_x else None, w)
        ctx.map, ctx.recording, ctx.bias = map, recording, b
        return map.apply(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return None, None, None, None, None
        x, w = ctx.saved_tensors
        map, create_graph = ctx.map, records(g)
        grad_x = grad_w = None
        if wants(ctx, 0):
            if create_graph:
                grad_x = ToInput.apply(g, w, ctx.bias, None if x is None else x.detach(), map, ctx.recording)
            else:
                grad_x = map.to_input(g, w, x)
        if wants(ctx, 1):
            grad_w = ToWeight.apply(g, x, w.detach(), map) if create_graph else map.to_weight(g, x, w)
        grad_b = map.to_bias(g) if wants(ctx, 2) else None
        return grad_x, grad_w, grad_b, None, None


class ToInput(Node):
    """map.to_input(g, w): linear in g and in w. Highest gradient order: any.

    b is an argument so that its gradient is zeros, as autograd's own would be, instead of None. x is what w was applied
    to, or None where nothing needs it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        w: Tensor,
        b: Tensor | None,
        x: Tensor | None,
        map: BilinearMap,
        recording: Recording | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, w, x)
        ctx.map, ctx.recording, ctx.bias = map, recording, b
        return map.to_input(g, w, x)

    @staticmethod
    def backward(ctx: Any, t: Tensor | None) -> tuple[Any, ...]:
        if t is None:
            return None, None, None, None, None, None
        g, w, x = ctx.saved_tensors
        map, recording = ctx.map, ctx.recording
        seeds = None if recording is None else recording.seeds
        create_graph = records(t)
        grad_g = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_g = Apply.apply(t, w, None, map, None) if create_graph else map.apply(t, w, None)
        if wants(ctx, 1, recording):
            stream = t if seeds is None else torch.addcmul(t, _column(seeds, x), x)
            grad_w = ToWeight.apply(g, stream, w.detach(), map) if create_graph else map.to_weight(g, stream, w)
        if wants(ctx, 2, recording):
            grad_b = torch.zeros_like(ctx.bias) if seeds is None else map.to_bias(g, seeds)
        return grad_g, grad_w, grad_b, None, None, None


class ToWeight(Node):
    """map.to_weight(g, x): linear in g and in x. Highest gradient order: any."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, map: BilinearMap) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x)
        ctx.map = map
        return map.to_weight(g, x, w)

    @staticmethod
    def backward(ctx: Any, t: Tensor | None) -> tuple[Any, ...]:
        if t is None:
            return None, None, None, None
        g, x = ctx.saved_tensors
        map, create_graph = ctx.map, records(t)
        grad_g = grad_x = None
        if wants(ctx, 0):
            grad_g = Apply.apply(x, t, None, map, None) if create_graph else map.apply(x, t, None)
        if wants(ctx, 1):
            grad_x = ToInput.apply(g, t, None, x.detach(), map, None) if create_graph else map.to_input(g, t, x)
        return grad_g, grad_x, None, None


def _column(seeds: Tensor, like: Tensor) -> Tensor:
    return seeds.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def convolution(dims: int) -> Any:
    """The row of conv1d, conv2d, conv3d."""

    def row(
        recording: Recording,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not reroutable(input, weight, bias) or input.dim() != dims + 2:
            return NotImplemented
        spread = _tuple(dilation, dims)
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
            if padding not in ("same", "valid"):
                return NotImplemented
            if padding == "same" and (any(n % 2 for n in total) or set(_tuple(stride, dims)) != {1}):
                return NotImplemented
            padding = [n // 2 for n in total] if padding == "same" else 0
        map = Convolution(_tuple(stride, dims), _tuple(padding, dims), spread, False, _tuple(0, dims), groups)
        return _apply(input, weight, bias, map, recording)

    return row


def transposed_convolution(dims: int) -> Any:
    """The row of conv_transpose1d, conv_transpose2d, conv_transpose3d."""

    def row(
        recording: Recording,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        if not reroutable(input, weight, bias) or input.dim() != dims + 2:
            return NotImplemented
        stride, padding, dilation, output_padding = (
            _tuple(o, dims) for o in (stride, padding, dilation, output_padding)
        )
        map = Convolution(stride, padding, dilation, True, output_padding, groups)
        return _apply(input, weight, bias, map, recording)

    return row


def linear(recording: Recording, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """The row of linear."""
    if not reroutable(input, weight, bias) or weight.dim() != 2 or input.dim() < 2:
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[:1]:
        w, b = autocast(weight, bias)
        assert w is not None
        assert b is not None
        if b.dtype != w.dtype:
            return NotImplemented
        y = linear(recording, input, weight)
        return y + b.expand_as(y)
    return _apply(input, weight, bias, Linear(), recording)


def _apply(x: Tensor, w: Tensor, b: Tensor | None, map: BilinearMap, recording: Recording) -> Tensor:
    # views, so that `sharing` can ask for gradients of this use of a parameter, without its hooks
    w, b = w.view_as(w), None if b is None else b.view_as(b)
    return Apply.apply(*autocast(x, w, b), map, recording)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if hasattr(value, "__iter__") else (int(value),)
    return values * dims if len(values) == 1 else values
