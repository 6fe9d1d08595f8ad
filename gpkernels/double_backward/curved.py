"""Smooth activations: the second derivative does send something back to x.

    Bend  y  = act(x)        to x: Bent(g, k)
    Bent  gx = act'(k) g     to g: Bent(t, k)     to k: act''(k) g t

k is what torch keeps too: the argument x or, where act' is simpler in it, the result y, through which the second
derivative then goes on to x. Torch's own first derivatives are made of a dozen recorded operations where create_graph
is asked for; here they stay one kernel, and act'' is written out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from gpkernels.double_backward._nodes import Node, Recording, autocast_float32, autocast_unknown, records, reroutable

aten = torch.ops.aten


class Curve(Protocol):
    keeps_result: ClassVar[bool]

    def apply(self, x: Tensor) -> Tensor: ...

    def adjoint(self, g: Tensor, k: Tensor) -> Tensor:
        """act' g."""

    def second(self, k: Tensor) -> Tensor:
        """The derivative of act' in k, in differentiable operations."""


@dataclass(frozen=True)
class Silu(Curve):
    keeps_result = False

    def apply(self, x: Tensor) -> Tensor:
        return aten.silu(x)

    def adjoint(self, g: Tensor, k: Tensor) -> Tensor:
        return aten.silu_backward(g, k)

    def second(self, k: Tensor) -> Tensor:
        s = k.sigmoid()
        return s * (1 - s) * (2 + k * (1 - 2 * s))


@dataclass(frozen=True)
class Gelu(Curve):
    approximate: str
    keeps_result = False

    def apply(self, x: Tensor) -> Tensor:
        return aten.gelu(x, approximate=self.approximate)

    def adjoint(self, g: Tensor, k: Tensor) -> Tensor:
        return aten.gelu_backward(g, k, approximate=self.approximate)

    def second(self, k: Tensor) -> Tensor:
        if self.approximate == "none":
            return (-0.5 * k * k).exp() * (2 - k * k) * (1 / math.sqrt(2 * math.pi))
        a, c = 0.044715, math.sqrt(2 / math.pi)  # act(x) = x (1 + tanh u) / 2, u = c (x + a x^3)
        t = (c * k * (1 + a * k * k)).tanh()
        du = c * (1 + 3 * a * k * k)
        return (1 - t * t) * (du + k * (3 * a * c * k - t * du * du))


@dataclass(frozen=True)
class Tanh(Curve):
    keeps_result = True

    def apply(self, x: Tensor) -> Tensor:
        return aten.tanh(x)

    def adjoint(self, g: Tensor, k: Tensor) -> Tensor:
        return aten.tanh_backward(g, k)

    def second(self, k: Tensor) -> Tensor:
        return -2 * k


@dataclass(frozen=True)
class Softplus(Curve):
    """log(1 + exp(beta x)) / beta; x where beta x > threshold."""

    beta: float
    threshold: float
    keeps_result = False

    def apply(self, x: Tensor) -> Tensor:
        return aten.softplus(x, self.beta, self.threshold)

    def adjoint(self, g: Tensor, k: Tensor) -> Tensor:
        return aten.softplus_backward(g, k, self.beta, self.threshold)

    def second(self, k: Tensor) -> Tensor:
        s = (self.beta * k).sigmoid()
        return torch.where(self.beta * k > self.threshold, 0.0, self.beta * s * (1 - s))


class Bend(Node):
    """curve.apply(x). Highest gradient order: any."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve) -> Tensor:
        ctx.set_materialize_grads(False)
        y = curve.apply(x)
        ctx.save_for_backward(y if curve.keeps_result else x)
        ctx.curve = curve
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        if g is None:
            return None, None
        (k,) = ctx.saved_tensors
        return _bent(g, k, ctx.curve), None


class Bent(Node):
    """act'(k) g, linear in g. Highest gradient order: any."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, k: Tensor, curve: Curve) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, k)
        ctx.curve = curve
        return curve.adjoint(g, k)

    @staticmethod
    def backward(ctx: Any, t: Tensor | None) -> tuple[Any, ...]:
        if t is None:
            return None, None, None
        g, k = ctx.saved_tensors
        in_g = _bent(t, k, ctx.curve) if ctx.needs_input_grad[0] else None
        in_k = ctx.curve.second(k) * g * t if ctx.needs_input_grad[1] else None
        return in_g, in_k, None


def _bent(g: Tensor, k: Tensor, curve: Curve) -> Tensor:
    return Bent.apply(g, k, curve) if records(g) else curve.adjoint(g, k)


def _bend(x: Any, curve: Curve) -> Any:
    return NotImplemented if not reroutable(x) or autocast_unknown(x) else Bend.apply(x, curve)


def silu(recording: Recording, input: Tensor, inplace: bool = False) -> Any:
    """The row of silu."""
    return NotImplemented if inplace else _bend(input, Silu())


def gelu(recording: Recording, input: Tensor, *, approximate: str = "none") -> Any:
    """The row of gelu."""
    return _bend(input, Gelu(approximate)) if approximate in ("none", "tanh") else NotImplemented


def tanh(recording: Recording, input: Tensor) -> Any:
    """The row of tanh."""
    return _bend(input, Tanh())


def softplus(recording: Recording, input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """The row of softplus."""
    (x,) = autocast_float32(input)
    return _bend(x, Softplus(float(beta), float(threshold)))
