"""grad_norm_penalty as autograd Functions.

GradNormPenalty -> GradNormPenaltyBackward -> a fused kernel for the second derivative. Where a graph of that
second derivative is asked for too, it is computed by the differentiable reference instead, so every order is
exact. `saved`, the norms (and for linf the number of elements that attain them), travels from forward to backward as a
cache: each formula is the total derivative in `grad`, the norms being functions of it, and no gradient flows through
the cached copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkernels.ops._layout import layout_of
from gpkernels.ops.grad_penalty import reference
from gpkernels.registry import Implementation

Options = tuple[int, float, int, int, int]
"""form, target, norm, axes, reduction: the raw ops' last arguments."""

Call = tuple[Options, Implementation]
"""The constants of a call."""


class GradNormPenalty(torch.autograd.Function):
    """The reduced phi(||grad||). Highest gradient order: any, in grad."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, call: Call) -> Tensor:
        options, impl = call
        value, saved = impl.forward(grad, *options)
        ctx.save_for_backward(grad, saved)
        ctx.call = call
        return value

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        grad, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return GradNormPenaltyBackward.apply(grad_out, grad, saved, ctx.call), None
        options, impl = ctx.call
        return impl.backward(grad_out.contiguous(), grad, saved, *options), None


class GradNormPenaltyBackward(torch.autograd.Function):
    """The gradient of the penalty in grad. Highest gradient order: any, in grad_out and grad."""

    @staticmethod
    def forward(ctx: Any, grad_out: Tensor, grad: Tensor, saved: Tensor, call: Call) -> Tensor:
        grad_out = grad_out.contiguous()
        ctx.save_for_backward(grad_out, grad, saved)
        ctx.call = call
        options, impl = call
        return impl.backward(grad_out, grad, saved, *options)

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Any, ...]:
        grad_out, grad, saved = ctx.saved_tensors
        options, impl = ctx.call
        if torch.is_grad_enabled():
            in_grad, in_grad_out = reference.grad_norm_penalty_double_backward(
                grad_grad, grad_out, grad, None, *options
            )
        else:
            grad_grad = grad_grad.contiguous(memory_format=layout_of(grad))
            in_grad, in_grad_out = impl.double_backward(grad_grad, grad_out, grad, saved, *options)
        return in_grad_out, in_grad, None, None
