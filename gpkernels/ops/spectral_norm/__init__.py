"""spectral_norm: power iterations of many weights at once, and the weights divided by the singular values found."""

import torch

from gpkernels import _support, registry
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._library import define, kernel, triton_kernel
from gpkernels.ops.spectral_norm import reference


def _fake_iterate(weights, u, v, dims, iterations, eps):
    first = weights[0]
    return first.new_empty((len(weights),), dtype=accumulation_dtype(first.dtype))


def _fake_scale(weights, sigma, targets, eps):
    return [torch.empty_like(w) for w in weights]


def _fake_scale_backward(grads, weights, u, v, sigma, dims, targets, eps):
    return [torch.empty_like(w) for w in weights]


define(
    "spectral_norm_iterate(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, int[] dims, int iterations, float eps)"
    " -> Tensor",
    reference.spectral_norm_iterate,
    _fake_iterate,
)
define(
    "spectral_norm_scale(Tensor[] weights, Tensor sigma, float[] targets, float eps) -> Tensor[]",
    reference.spectral_norm_scale,
    _fake_scale,
)
define(
    "spectral_norm_scale_backward(Tensor[] grads, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma, int[] dims,"
    " float[] targets, float eps) -> Tensor[]",
    reference.spectral_norm_scale_backward,
    _fake_scale_backward,
)

_NAMES = ("spectral_norm_scale", "spectral_norm_scale_backward", "spectral_norm_iterate")
_TRITON = "gpkernels.ops.spectral_norm.triton"

for _backend, _supports, (_scale, _backward, _iterate) in (
    ("reference", _support.always, [getattr(reference, name) for name in _NAMES]),
    ("cpu", _support.native_cpu, [kernel(name) for name in _NAMES]),
    ("triton", _support.triton, [triton_kernel(name, _TRITON) for name in _NAMES]),
    ("cuda", _support.native_cuda, [kernel(name) for name in _NAMES]),
):
    registry.register(registry.Implementation("spectral_norm", _backend, _supports, _scale, _backward, update=_iterate))
