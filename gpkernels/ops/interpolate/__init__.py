"""interpolate: out = eps real + (1 - eps) fake, with eps given or drawn."""

import torch

from gpkernels import registry
from gpkernels.ops import _support
from gpkernels.ops._library import define, kernel
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

registry.register(
    registry.Implementation(
        "interpolate",
        "reference",
        _support.always,
        forward=reference.interpolate,
        backward=reference.interpolate_backward,
    )
)
registry.register(
    registry.Implementation(
        "interpolate",
        "cpu",
        _support.native_cpu,
        forward=kernel("interpolate"),
        backward=kernel("interpolate_backward"),
    )
)
