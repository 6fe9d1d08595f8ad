"""interpolate: out = eps real + (1 - eps) fake, with eps given or drawn."""

import torch

from gpkernels.ops._library import define
from gpkernels.ops._rows import register_backends
from gpkernels.ops.interpolate import reference


def _fake(real, fake, eps, seed, per_element):
    return torch.empty_like(real)


def _fake_backward(grad_out, eps, seed, per_element, need_real, need_fake):
    return tuple(torch.empty_like(grad_out) if need else grad_out.new_empty(0) for need in (need_real, need_fake))


define(
    "interpolate(Tensor real, Tensor fake, Tensor? eps, Tensor? seed, bool per_element) -> Tensor",
    reference.interpolate,
    _fake,
)
define(
    "interpolate_backward(Tensor grad_out, Tensor? eps, Tensor? seed, bool per_element, bool need_real,"
    " bool need_fake) -> (Tensor, Tensor)",
    reference.interpolate_backward,
    _fake_backward,
)

register_backends("interpolate", reference, ("interpolate", "interpolate_backward"))
