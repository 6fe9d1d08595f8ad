"""Piecewise linear activations: y' is a constant almost everywhere, so nothing returns to x from the second
derivative.

    Activate  y  = act(x)        to x: Slope(g, y)
    Slope     gx = act' g        to g: Slope(t, y)      to x: nothing (None, where torch makes zeros)

act' is read off the result, which the next layer keeps anyway, so the input need not be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkernels.double_backward import norms
from gpkernels.double_backward._nodes import Node, Recording, reroutable

aten = torch.ops.aten


@dataclass(frozen=True)
class Leaky:
    """max(x, slope x), for 0 <= slope; slope 0 is ReLU."""

    slope: float

    def apply(self, x: Tensor, *, in_place: bool) -> Tensor:
        if self.slope == 0:
            return aten.relu_(x) if in_place else aten.relu(x)
        return aten.leaky_relu_(x, self.slope) if in_place else aten.leaky_relu(x, self.slope)

    def adjoint(self, g: Tensor, y: Tensor) -> Tensor:
        if self.slope == 0:
            return aten.threshold_backward(g, y, 0)
        return aten.leaky_relu_backward(g, y, self.slope, True)


@dataclass(frozen=True)
class Clip:
    """min(max(x, low), high): hardtanh, ReLU6."""

    low: float
    high: float

    def apply(self, x: Tensor, *, in_place: bool) -> Tensor:
        return aten.hardtanh_(x, self.low, self.high) if in_place else aten.hardtanh(x, self.low, self.high)

    def adjoint(self, g: Tensor, y: Tensor) -> Tensor:
        return aten.hardtanh_backward(g, y, self.low, self.high)


class Activate(Node):
    """act.apply(x). Highest gradient order: any."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Leaky | Clip, in_place: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        y = act.apply(x, in_place=in_place)
        if in_place:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.act = act
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return None, None, None
        (y,) = ctx.saved_tensors
        act = ctx.act
        return (Slope.apply(g, y.detach(), act) if torch.is_grad_enabled() else act.adjoint(g, y)), None, None


class Slope(Node):
    """act' g, linear in g. Highest gradient order: any."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor, act: Leaky | Clip) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y)
        ctx.act = act
        return act.adjoint(g, y)

    @staticmethod
    def backward(ctx: Any, t: Tensor | None) -> tuple[Any, ...]:
        if t is None:
            return None, None, None
        (y,) = ctx.saved_tensors
        act = ctx.act
        return (Slope.apply(t, y, act) if torch.is_grad_enabled() else act.adjoint(t, y)), None, None


def _activate(act: Leaky | Clip, x: Tensor, in_place: bool) -> Any:
    if not reroutable(x) or (in_place and x._is_view()):
        return NotImplemented
    if isinstance(act, Leaky) and (fused := norms.activated(x, act.slope, act.apply, in_place)) is not None:
        return fused
    return Activate.apply(x, act, in_place)


def relu(recording: Recording, input: Tensor, inplace: bool = False) -> Any:
    """The row of relu."""
    return _activate(Leaky(0.0), input, inplace)


def relu_(recording: Recording, input: Tensor) -> Any:
    """The row of relu_."""
    return _activate(Leaky(0.0), input, True)


def leaky_relu(recording: Recording, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    """The row of leaky_relu. With a negative slope the result does not tell the input's sign."""
    return _activate(Leaky(float(negative_slope)), input, inplace) if negative_slope >= 0 else NotImplemented


def relu6(recording: Recording, input: Tensor, inplace: bool = False) -> Any:
    """The row of relu6."""
    return _activate(Clip(0.0, 6.0), input, inplace)


def hardtanh(
    recording: Recording, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    """The row of hardtanh."""
    return _activate(Clip(float(min_val), float(max_val)), input, inplace)


def prelu(recording: Recording, input: Tensor, weight: Tensor) -> Any:
    """The row of prelu: where(x > 0, x, w x), whose parts have no zero streams."""
    if not reroutable(input, weight):
        return NotImplemented
    slopes = weight.view(-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 and input.dim() > 1 else weight
    return torch.where(input > 0, input, slopes * input)
