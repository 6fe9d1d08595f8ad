"""perturb: out = real + scale sigma noise, the noise drawn in the kernel."""

import torch

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._library import define
from gpkernels.ops._rows import register_backends
from gpkernels.ops.perturb import reference


def _fake(real, sigma, scale, noise, seed):
    return torch.empty_like(real)


def _fake_backward(grad_out, scale, noise, seed):
    return grad_out.new_empty((), dtype=accumulation_dtype(grad_out.dtype))


define(
    "perturb(Tensor real, Tensor? sigma, float scale, int noise, Tensor seed) -> Tensor",
    reference.perturb,
    _fake,
)
define(
    "perturb_backward(Tensor grad_out, float scale, int noise, Tensor seed) -> Tensor",
    reference.perturb_backward,
    _fake_backward,
)

register_backends("perturb", reference, ("perturb", "perturb_backward"))
