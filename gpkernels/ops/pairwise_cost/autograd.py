"""pairwise_cost as autograd Functions.

C is piecewise linear: its slope C'(a) travels from forward to backward as a constant, and the backward is linear in
the gradient that comes in. So nothing of the second order flows into the losses, and what flows into that gradient is
exact, to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkernels.registry import Implementation

Options = tuple[float, float, Implementation]
"""margin, slope and the backend: the constants of a call."""


class PairwiseCost(torch.autograd.Function):
    """(cost, delta). Highest gradient order: any, of cost in the losses; none in real and fake, nor of delta."""

    @staticmethod
    def forward(
        ctx: Any, real: Tensor, fake: Tensor, loss_real: Tensor, loss_fake: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        margin, slope, impl = options
        cost, delta, slope_at = impl.forward(real, fake, loss_real, loss_fake, margin, slope)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(delta)
        ctx.save_for_backward(slope_at)
        ctx.impl = impl
        return cost, delta

    @staticmethod
    def backward(ctx: Any, grad_cost: Tensor | None, grad_delta: None) -> tuple[Tensor | None, ...]:
        if grad_cost is None:
            return None, None, None, None, None
        (slope_at,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = PairwiseCostBackward.apply(grad_cost, slope_at, ctx.impl)
        else:
            grads = ctx.impl.backward(grad_cost.contiguous(), slope_at)
        need_real, need_fake = ctx.needs_input_grad[2:4]
        return None, None, grads[0] if need_real else None, grads[1] if need_fake else None, None


class PairwiseCostBackward(torch.autograd.Function):
    """(C'(a) grad_cost, -C'(a) grad_cost). Highest gradient order: any, in grad_cost."""

    @staticmethod
    def forward(ctx: Any, grad_cost: Tensor, slope_at: Tensor, impl: Implementation) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope_at)
        return impl.backward(grad_cost.contiguous(), slope_at)

    @staticmethod
    def backward(ctx: Any, tangent_real: Tensor | None, tangent_fake: Tensor | None) -> tuple[Tensor | None, ...]:
        """In plain torch, on vectors of B numbers: differentiable as it stands."""
        (slope_at,) = ctx.saved_tensors
        if tangent_fake is None:
            return None if tangent_real is None else slope_at * tangent_real, None, None
        difference = -tangent_fake if tangent_real is None else tangent_real - tangent_fake
        return slope_at * difference, None, None
