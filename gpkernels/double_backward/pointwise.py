"""Piecewise linear activations: y' is a constant almost everywhere, so nothing returns to x from the second
derivative.

    Activate  y  = act(x)        to x: Slope(g)
    Slope     gx = act' g        to g: Slope(t)      to x: nothing (None, where torch makes zeros)

act' is the same read off x or y. y is kept, which the next layer keeps anyway, where torch keeps x for LeakyReLU. So
that a critic may change y in place all the same, the mode calls `rescue` before it does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from gpkernels.double_backward import norms
from gpkernels.double_backward._nodes import Node, Recording, autocast, records, reroutable

aten = torch.ops.aten


class Activation(Protocol):
    torch_keeps_result: ClassVar[bool]

    def apply(self, x: Tensor, *, in_place: bool) -> Tensor: ...

    def adjoint(self, g: Tensor, kept: Tensor) -> Tensor:
        """act' g, for act' read off `kept`: the activation's argument or its result."""

    def gradient(self, g: Tensor, kept: Tensor) -> Tensor:
        """adjoint(g), recorded where the running backward is."""
        return Slope.apply(g, kept.detach(), self) if records(g) else self.adjoint(g, kept)


@dataclass(frozen=True)
class Leaky(Activation):
    """x where x > 0, else slope x, for slope >= 0."""

    slope: float
    torch_keeps_result = False

    def apply(self, x: Tensor, *, in_place: bool) -> Tensor:
        return aten.leaky_relu_(x, self.slope) if in_place else aten.leaky_relu(x, self.slope)

    def adjoint(self, g: Tensor, kept: Tensor) -> Tensor:
        return aten.leaky_relu_backward(g, kept, self.slope, True)


@dataclass(frozen=True)
class Relu(Activation):
    slope = 0.0
    torch_keeps_result = True

    def apply(self, x: Tensor, *, in_place: bool) -> Tensor:
        return aten.relu_(x) if in_place else aten.relu(x)

    def adjoint(self, g: Tensor, kept: Tensor) -> Tensor:
        return aten.threshold_backward(g, kept, 0)


@dataclass(frozen=True)
class Clip(Activation):
    """min(max(x, low), high): hardtanh, ReLU6."""

    low: float
    high: float
    torch_keeps_result = False

    def apply(self, x: Tensor, *, in_place: bool) -> Tensor:
        return aten.hardtanh_(x, self.low, self.high) if in_place else aten.hardtanh(x, self.low, self.high)

    def adjoint(self, g: Tensor, kept: Tensor) -> Tensor:
        return aten.hardtanh_backward(g, kept, self.low, self.high)


class Activate(Node):
    """act.apply(x). Highest gradient order: any."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Activation, in_place: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        y = act.apply(x, in_place=in_place)
        if in_place:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.act, ctx.rescued = act, None
        ctx.may_change = not (in_place or act.torch_keeps_result)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return None, None, None
        (kept,) = ctx.saved_tensors if ctx.rescued is None else (ctx.rescued,)
        return ctx.act.gradient(g, kept), None, None

    @staticmethod
    def rescue(node: Any, y: Tensor) -> None:
        node.rescued = y


class Slope(Node):
    """act' g, linear in g. Highest gradient order: any."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, kept: Tensor, act: Activation) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept)
        ctx.act = act
        return act.adjoint(g, kept)

    @staticmethod
    def backward(ctx: Any, t: Tensor | None) -> tuple[Any, ...]:
        if t is None:
            return None, None, None
        (kept,) = ctx.saved_tensors
        return ctx.act.gradient(t, kept), None, None


def rescue(tensor: Tensor) -> None:
    """Keeps a copy of an activation's result that is about to be changed, where torch would not need it. What has been
    changed unseen is too late to copy: its version tells autograd."""
    base = tensor if tensor._base is None else tensor._base
    node: Any = base.grad_fn
    if isinstance(node, _ACTIVATIONS) and node.may_change and node.rescued is None and not base._version:
        node._forward_cls.rescue(node, base.detach().clone())


_ACTIVATIONS: Any = (Activate._backward_cls, norms.NormActivation._backward_cls)


def _activate(recording: Recording, act: Activation, x: Tensor, in_place: bool) -> Any:
    if not reroutable(x) or (in_place and x._is_view()):
        return NotImplemented
    if in_place:
        rescue(x)
    if not isinstance(act, Clip) and not recording.hooked:
        fused = norms.activated(recording, x, act, in_place)
        if fused is not None:
            return fused
    return Activate.apply(x, act, in_place)


def relu(recording: Recording, input: Tensor, inplace: bool = False) -> Any:
    """The row of relu."""
    return _activate(recording, Relu(), input, inplace)


def relu_(recording: Recording, input: Tensor) -> Any:
    """The row of relu_."""
    return _activate(recording, Relu(), input, True)


def leaky_relu(recording: Recording, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    """The row of leaky_relu. With a negative slope the result does not tell the input's sign."""
    return _activate(recording, Leaky(float(negative_slope)), input, inplace) if negative_slope >= 0 else NotImplemented


def relu6(recording: Recording, input: Tensor, inplace: bool = False) -> Any:
    """The row of relu6."""
    return _activate(recording, Clip(0.0, 6.0), input, inplace)


def hardtanh(
    recording: Recording, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    """The row of hardtanh. A bound that the dtype cannot hold is rounded in the result, and may then lie inside."""
    low, high = float(min_val), float(max_val)
    if not low <= high or not (_holds(input.dtype, low) and _holds(input.dtype, high)):
        return NotImplemented
    return _activate(recording, Clip(low, high), input, inplace)


def _holds(dtype: torch.dtype, bound: float) -> bool:
    """Whether the bound as torch compares with it, which is of float32 at least, is a number of that dtype."""
    try:
        if dtype is torch.bfloat16:
            return struct.pack(">f", bound).endswith(b"\0\0")
        return dtype is not torch.float16 or struct.unpack("e", struct.pack("e", bound))[0] == bound
    except OverflowError:
        return False


def prelu(recording: Recording, input: Tensor, weight: Tensor) -> Any:
    """The row of prelu: where(x > 0, x, w x), whose parts have no zero streams."""
    channels = input.shape[1] if input.dim() > 1 else 1
    if not reroutable(input, weight) or weight.dim() > 1 or weight.numel() not in (1, channels):
        return NotImplemented
    x: Any
    w: Any
    x, w = autocast(input, weight)
    if x.dtype != w.dtype:
        return NotImplemented
    slopes = w.view(-1, *[1] * (x.dim() - 2)) if w.numel() > 1 and x.dim() > 1 else w.view(())
    return torch.where(x > 0, x, slopes * x)
