"""pairwise_cost in plain torch: the specification, and the backend for devices without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype


def pairwise_cost(
    real: Tensor, fake: Tensor, loss_real: Tensor, loss_fake: Tensor, margin: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(C(a), delta, C'(a)), of shape (B,) and in the accumulation dtype, as are the losses."""
    dtype = accumulation_dtype(real.dtype)
    real, fake = (x.detach().to(dtype).reshape(x.shape[0], x.shape[1:].numel()) for x in (real, fake))
    delta = margin * (real - fake).abs_().sum(1)
    a = delta + loss_real - loss_fake
    above = a >= 0
    return torch.where(above, a, slope * a), delta, torch.where(above, torch.ones_like(delta), slope)


def pairwise_cost_backward(grad_cost: Tensor, slope_at: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients in loss_real and in loss_fake."""
    grad = grad_cost * slope_at
    return grad, -grad
