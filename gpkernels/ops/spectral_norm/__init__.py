"""spectral_norm: power iterations of many weights at once, and the weights divided by the singular values found."""

import torch

from gpkernels import _support, registry
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._library import define, kernel, triton_kernel
from gpkernels.ops.spectral_norm import reference
from gpkernels.ops.spectral_norm.layout import pack, vectors_size


def _fake_iterate(weights, u, v, dims, iterations, eps):
    first = weights[0]
    return first.new_empty((len(weights),), dtype=accumulation_dtype(first.dtype))


def _fake_update(weights, u, v, results, dims, targets, iterations, eps):
    return _fake_iterate(weights, u, v, dims, iterations, eps), u[0].new_empty((vectors_size(weights, dims),))


def _fake_scale(weights, sigma, targets, eps):
    return [torch.empty_like(w) for w in weights]


def _fake_scale_backward(grads, weights, vectors, sigma, dims, targets, eps):
    return [torch.empty_like(w) for w in weights]


def _reference_update(weights, u, v, dims, targets, iterations, eps):
    sigma = reference.spectral_norm_iterate(weights, u, v, dims, iterations, eps)
    return sigma, pack(u, v), reference.spectral_norm_scale(weights, sigma, targets, eps)


def _into_results(weights, u, v, results, *rest):
    sigma, vectors, found = _reference_update(weights, u, v, *rest)
    for result, x in zip(results, found, strict=True):
        result.copy_(x)
    return sigma, vectors


define(
    "spectral_norm_iterate(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, int[] dims, int iterations, float eps)"
    " -> Tensor",
    reference.spectral_norm_iterate,
    _fake_iterate,
)
define(
    "spectral_norm_update(Tensor[] weights, Tensor(a!)[] u, Tensor(b!)[] v, Tensor(c!)[] results, int[] dims,"
    " float[] targets, int iterations, float eps) -> (Tensor, Tensor)",
    _into_results,
    _fake_update,
)
define(
    "spectral_norm_scale(Tensor[] weights, Tensor sigma, float[] targets, float eps) -> Tensor[]",
    reference.spectral_norm_scale,
    _fake_scale,
)
define(
    "spectral_norm_scale_backward(Tensor[] grads, Tensor[] weights, Tensor vectors, Tensor sigma, int[] dims,"
    " float[] targets, float eps) -> Tensor[]",
    reference.spectral_norm_scale_backward,
    _fake_scale_backward,
)

_NAMES = ("spectral_norm_scale", "spectral_norm_scale_backward", "spectral_norm_iterate")
_UPDATE = "spectral_norm_update"
_TRITON = "gpkernels.ops.spectral_norm.triton"


def _with_results(op):
    def update(weights, u, v, dims, targets, iterations, eps):
        results = [torch.empty_like(w) for w in weights]
        return *op(weights, u, v, results, dims, targets, iterations, eps), results

    return update


for _backend, _supports, (_scale, _backward, _iterate), _update in (
    ("reference", _support.always, [getattr(reference, name) for name in _NAMES], _reference_update),
    ("cpu", _support.native_cpu, map(kernel, _NAMES), _with_results(kernel(_UPDATE))),
    (
        "triton",
        _support.triton,
        [triton_kernel(name, _TRITON) for name in _NAMES],
        _with_results(triton_kernel(_UPDATE, _TRITON)),
    ),
    ("cuda", _support.native_cuda, map(kernel, _NAMES), _with_results(kernel(_UPDATE))),
):
    _row = registry.Implementation("spectral_norm", _backend, _supports, _scale, _backward, None, _iterate, _update)
    registry.register(_row)
