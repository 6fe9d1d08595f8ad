"""perturb as autograd Functions.

With the noise n fixed by its seed, out = real + scale sigma n is linear in (real, sigma). Its adjoint is the
identity in real and g -> scale <g, n> in sigma; the adjoint of that is t -> scale t n, the op at real = 0. So the
pair supports gradients of any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkernels.registry import Implementation

Options = tuple[float, int, torch.memory_format, Implementation]
"""scale, noise, the layout of real, and the backend: the constants of a call."""


class Perturb(torch.autograd.Function):
    """real + scale sigma noise. Highest gradient order: any, in real and sigma."""

    @staticmethod
    def forward(ctx: Any, real: Tensor, sigma: Tensor | None, seed: Tensor, options: Options) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.options = options
        scale, noise, _, impl = options
        return impl.forward(real, sigma, scale, noise, seed)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        grad_sigma = None
        if ctx.needs_input_grad[1]:
            grad_sigma = PerturbBackward.apply(grad_out, seed, ctx.options)
        return grad_out, grad_sigma, None, None


class PerturbBackward(torch.autograd.Function):
    """scale <grad_out, noise>, the gradient in sigma. Highest gradient order: any, in grad_out."""

    @staticmethod
    def forward(ctx: Any, grad_out: Tensor, seed: Tensor, options: Options) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.options = options
        scale, noise, layout, impl = options
        ctx.shape, ctx.dtype = grad_out.shape, grad_out.dtype
        return impl.backward(grad_out.contiguous(memory_format=layout), scale, noise, seed)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        layout = ctx.options[2]
        zero = tangent.new_zeros(ctx.shape, dtype=ctx.dtype).contiguous(memory_format=layout)
        return Perturb.apply(zero, tangent, seed, ctx.options), None, None
