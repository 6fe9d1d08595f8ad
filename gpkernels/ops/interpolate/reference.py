"""interpolate in plain torch: the specification, and the backend for devices without a kernel."""

from __future__ import annotations

from torch import Tensor

from gpkernels.ops import random
from gpkernels.ops._layout import accumulation_dtype


def _weights(like: Tensor, eps: Tensor | None, seed: Tensor | None, per_element: bool) -> Tensor:
    """eps in a shape that broadcasts against `like`, in the accumulation dtype."""
    if eps is None:
        assert seed is not None
        if per_element:
            eps = random.in_memory_order(random.uniform(seed, like.numel()), like)
        else:
            eps = random.uniform(seed, like.shape[0])
    eps = eps.to(accumulation_dtype(like.dtype))
    return eps if per_element else eps.view(-1, *[1] * (like.dim() - 1))


def interpolate(real: Tensor, fake: Tensor, eps: Tensor | None, seed: Tensor | None, per_element: bool) -> Tensor:
    weight = _weights(real, eps, seed, per_element)
    return (weight * real + (1 - weight) * fake).to(real.dtype)


def interpolate_backward(
    grad_out: Tensor,
    eps: Tensor | None,
    seed: Tensor | None,
    per_element: bool,
    need_real: bool,
    need_fake: bool,
) -> tuple[Tensor, Tensor]:
    """(eps grad_out, (1 - eps) grad_out); an empty tensor in place of one that is not needed."""
    weight = _weights(grad_out, eps, seed, per_element)
    nothing = grad_out.new_empty(0)
    return (
        (weight * grad_out).to(grad_out.dtype) if need_real else nothing,
        ((1 - weight) * grad_out).to(grad_out.dtype) if need_fake else nothing.clone(),
    )
