"""interpolate as autograd Functions.

The op is linear in (real, fake), so its backward is its adjoint g -> (eps g, (1 - eps) g), whose backward is the
op again: the pair supports gradients of any order. eps is a constant. Only the seed is kept between passes; eps
is drawn again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkernels.registry import Implementation

Options = tuple[bool, torch.memory_format, Implementation]
"""per_element, the layout of real and fake, and the backend: the constants of a call."""


class Interpolate(torch.autograd.Function):
    """eps real + (1 - eps) fake. Highest gradient order: any, in real and fake."""

    @staticmethod
    def forward(
        ctx: Any,
        real: Tensor,
        fake: Tensor,
        eps: Tensor | None,
        seed: Tensor | None,
        options: Options,
    ) -> Tensor:
        ctx.save_for_backward(eps, seed)
        ctx.options = options
        per_element, _, impl = options
        return impl.forward(real, fake, eps, seed, per_element)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        eps, seed = ctx.saved_tensors
        need_real, need_fake = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            grads = InterpolateBackward.apply(grad_out, eps, seed, need_real, need_fake, ctx.options)
        else:
            per_element, layout, impl = ctx.options
            grad_out = grad_out.contiguous(memory_format=layout)
            grads = impl.backward(grad_out, eps, seed, per_element, need_real, need_fake)
        return (grads[0] if need_real else None, grads[1] if need_fake else None, None, None, None)


class InterpolateBackward(torch.autograd.Function):
    """(eps grad_out, (1 - eps) grad_out). Highest gradient order: any, in grad_out."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_out: Tensor,
        eps: Tensor | None,
        seed: Tensor | None,
        need_real: bool,
        need_fake: bool,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(eps, seed)
        ctx.options = options
        per_element, layout, impl = options
        grad_out = grad_out.contiguous(memory_format=layout)
        return impl.backward(grad_out, eps, seed, per_element, need_real, need_fake)

    @staticmethod
    def backward(ctx: Any, tangent_real: Tensor | None, tangent_fake: Tensor | None) -> tuple[Any, ...]:
        eps, seed = ctx.saved_tensors
        result: Tensor | None = None
        if tangent_real is not None and tangent_fake is not None:
            layout = ctx.options[1]
            tangents = [t.contiguous(memory_format=layout) for t in (tangent_real, tangent_fake)]
            result = Interpolate.apply(*tangents, eps, seed, ctx.options)
        elif tangent_real is not None:
            result = InterpolateBackward.apply(tangent_real, eps, seed, True, False, ctx.options)[0]
        elif tangent_fake is not None:
            result = InterpolateBackward.apply(tangent_fake, eps, seed, False, True, ctx.options)[1]
        return result, None, None, None, None, None
