"""Compiles what spectral_norm's Triton launchers would launch, for GPUs that need not be here; prints one JSON record
each."""

import json

import torch
import triton_compiled
from triton.backends.compiler import GPUTarget

from gpkernels.ops.spectral_norm import triton as spectral
from gpkernels.ops.spectral_norm.layout import vectors_size


def launches(calls):
    """The distinct (kernel, arguments, constants) that `calls` would launch."""
    found = {}

    def record(kernel, programs, *arguments, **constants):
        assert programs > 0
        specialised, options = triton_compiled.source(kernel, arguments, constants, GPUTarget("cuda", 90, 32))
        found.setdefault((specialised.hash(), *options.items()), (kernel, arguments, constants))

    spectral.launch = record
    calls()
    return list(found.values())


def call(shapes, dtype, place=torch.empty):
    accumulation = torch.promote_types(dtype, torch.float32)
    weights = [place(shape, dtype=dtype) for shape in shapes]
    u = [torch.empty(w.shape[0], dtype=accumulation) for w in weights]
    v = [torch.empty(w.numel() // w.shape[0], dtype=accumulation) for w in weights]
    dims, targets, sigma = [0] * len(weights), [1.0] * len(weights), torch.empty(len(weights), dtype=accumulation)
    for iterations in (0, 1):
        spectral.spectral_norm_iterate(weights, u, v, dims, iterations, 1e-12)
        spectral.spectral_norm_update(weights, u, v, weights, dims, targets, iterations, 1e-12)
    spectral.spectral_norm_scale(weights, sigma, targets, 1e-12)
    vectors = place((vectors_size(weights, dims),), dtype=accumulation)
    spectral.spectral_norm_scale_backward(weights, weights, vectors, sigma, dims, targets, 1e-12)


def unaligned(shape, dtype):
    return torch.empty(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)


CRITIC = ((64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4))


def common_calls():
    for dtype in (torch.float32, torch.bfloat16):
        call(CRITIC, dtype)


def other_calls():
    call(CRITIC[:1], torch.float64)
    call([(8, 9)] * 64, torch.float32)
    call(CRITIC[:2], torch.float16)
    call(CRITIC[:2], torch.float32, unaligned)


if __name__ == "__main__":
    common, others = launches(common_calls), launches(other_calls)
    records = [
        triton_compiled.report(*one, arch)
        for arch in triton_compiled.ARCHITECTURES
        for one in common + others * (arch == 90)
    ]
    print(json.dumps(records))
