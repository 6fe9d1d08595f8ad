"""norm_act: a normalisation with batch, instance, layer or group statistics, its affine map, and the (leaky) ReLU that
follows it. The forward is torch's own; the kernels here are its first and second derivative."""

import torch

from gpkernels import _support, registry
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._library import define, kernel, triton_kernel
from gpkernels.ops.norm_act import reference

_INPUTS = "Tensor grad_out, Tensor x, Tensor? z, Tensor mean, Tensor rstd, Tensor? weight, int groups, float slope"


def _fake_backward(grad_out, x, z, mean, rstd, weight, groups, slope, need_affine):
    channels = x.shape[1] if need_affine else 0
    affine = x.new_empty((channels,), dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x), affine, torch.empty_like(affine)


def _fake_double_backward(tangent, grad_out, x, z, mean, rstd, weight, groups, slope):
    in_weight = x.new_empty((x.shape[1],), dtype=accumulation_dtype(x.dtype))
    return torch.empty_like(x), torch.empty_like(x), in_weight


define(
    f"norm_act_backward({_INPUTS}, bool need_affine) -> (Tensor, Tensor, Tensor)",
    reference.norm_act_backward,
    _fake_backward,
)
define(
    f"norm_act_double_backward(Tensor tangent, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference.norm_act_double_backward,
    _fake_double_backward,
)

_NAMES = ("norm_act_backward", "norm_act_double_backward")
_TRITON = "gpkernels.ops.norm_act.triton"

for _backend, _supports, _kernels in (
    ("reference", _support.always, [getattr(reference, name) for name in _NAMES]),
    ("cpu", _support.native_cpu, [kernel(name) for name in _NAMES]),
    ("triton", _support.triton, [triton_kernel(name, _TRITON) for name in _NAMES]),
    ("cuda", _support.native_cuda, [kernel(name) for name in _NAMES]),
):
    registry.register(registry.Implementation("norm_act", _backend, _supports, reference.norm_act, *_kernels))
