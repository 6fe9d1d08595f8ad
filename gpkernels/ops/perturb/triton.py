"""perturb in Triton: one launch that reads real and writes the result, the noise drawn on the way."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._triton import Tiling, accumulation, launch, noise_block, tiling, weighted_sum


@triton.jit
def perturb_kernel(
    real,
    out,
    sigma,
    seed,
    n,
    scale: tl.float64,
    NOISE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    x = tl.load(real + i, mask=i < n).to(ACC)
    factor = tl.full((), scale, ACC)
    if sigma is not None:
        factor *= tl.load(sigma)
    tl.store(out + i, x + factor * noise_block(seed, first, NOISE, BLOCK).to(ACC), mask=i < n)


@triton.jit
def perturb_backward_kernel(
    grad_out,
    partial,
    seed,
    n,
    chunk,
    NOISE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    begin = pid.to(tl.int64) * chunk
    acc = tl.zeros((BLOCK,), ACC)
    for step in range(0, chunk, BLOCK):
        first = begin + step
        i = first + tl.arange(0, BLOCK)
        acc += tl.load(grad_out + i, mask=i < n, other=0.0).to(ACC) * noise_block(seed, first, NOISE, BLOCK).to(ACC)
    tl.store(partial + pid, tl.sum(acc, 0))


def _flat(x: Tensor) -> Tiling:
    return tiling(1, max(4, x.numel()))  # a tile takes whole Philox blocks


def perturb(real: Tensor, sigma: Tensor | None, scale: float, noise: int, seed: Tensor) -> Tensor:
    out = torch.empty_like(real)
    if out.numel() == 0:
        return out
    t = _flat(real)
    launch(
        perturb_kernel,
        t.tiles,
        real,
        out,
        sigma,
        seed,
        real.numel(),
        scale,
        NOISE=noise,
        ACC=accumulation(real),
        BLOCK=t.block_r,
    )
    return out


def perturb_backward(grad_out: Tensor, scale: float, noise: int, seed: Tensor) -> Tensor:
    dtype = accumulation_dtype(grad_out.dtype)
    if grad_out.numel() == 0:
        return grad_out.new_zeros((), dtype=dtype)
    t = _flat(grad_out)
    partial = grad_out.new_empty(t.splits, dtype=dtype)
    launch(
        perturb_backward_kernel,
        t.splits,
        grad_out,
        partial,
        seed,
        grad_out.numel(),
        t.chunk,
        NOISE=noise,
        ACC=accumulation(grad_out),
        BLOCK=t.block_r,
    )
    grad_sigma = grad_out.new_empty((), dtype=dtype)
    weighted_sum(partial, grad_sigma, scale)
    return grad_sigma
