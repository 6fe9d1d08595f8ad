"""pairwise_cost in Triton.

Forward: a launch that reduces the samples and, where there are fewer than fill a GPU, one that combines what its
programs left. Backward: one launch for both gradients.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._triton import TILE, accumulation, group_tile, launch, tiling
from gpkernels.ops.pairwise_cost import reference


@triton.jit
def _finish(
    distance,
    g,
    exists,
    loss_real,
    loss_fake,
    cost,
    delta,
    slope_at,
    margin: tl.float64,
    slope: tl.float64,
    ACC: tl.constexpr,
):
    """Stores what belongs to samples whose distance is complete."""
    d = tl.full((), margin, ACC) * distance
    a = d + tl.load(loss_real + g, mask=exists, other=0.0) - tl.load(loss_fake + g, mask=exists, other=0.0)
    at = tl.where(a >= 0, tl.full((), 1, ACC), tl.full((), slope, ACC))
    tl.store(delta + g, d, mask=exists)
    tl.store(cost + g, tl.where(a >= 0, a, at * a), mask=exists)
    tl.store(slope_at + g, at, mask=exists)


@triton.jit
def pairwise_cost_kernel(
    real,
    fake,
    loss_real,
    loss_fake,
    cost,
    delta,
    slope_at,
    partial,
    rows,
    n,
    chunk,
    margin: tl.float64,
    slope: tl.float64,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What belongs to each sample, or the distance that a split of it contributes."""
    pid = tl.program_id(0)
    splits = tl.cdiv(n, chunk)
    g, base, exists = group_tile(pid // splits, rows, n, 1, False, BLOCK_G)
    begin = (pid % splits).to(tl.int64) * chunk
    acc = tl.zeros((BLOCK_G, BLOCK_R), ACC)
    for step in range(0, chunk, BLOCK_R):
        r = begin + step + tl.arange(0, BLOCK_R)
        offset, mask = base[:, None] + r[None, :], exists[:, None] & (r < n)[None, :]
        x = tl.load(real + offset, mask=mask, other=0.0).to(ACC)
        y = tl.load(fake + offset, mask=mask, other=0.0).to(ACC)
        acc += tl.abs(x - y)
    distance = tl.sum(acc, 1)
    if SPLIT:
        tl.store(partial + g * splits + pid % splits, distance, mask=exists)
    else:
        _finish(distance, g, exists, loss_real, loss_fake, cost, delta, slope_at, margin, slope, ACC)


@triton.jit
def pairwise_cost_combine_kernel(
    partial,
    loss_real,
    loss_fake,
    cost,
    delta,
    slope_at,
    rows,
    splits,
    margin: tl.float64,
    slope: tl.float64,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Combines the splits of BLOCK_G samples a program."""
    g = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    s = tl.arange(0, BLOCK_S)
    exists = g < rows
    mask = exists[:, None] & (s < splits)[None, :]
    distance = tl.sum(tl.load(partial + g[:, None] * splits + s[None, :], mask=mask, other=0.0), 1)
    _finish(distance, g, exists, loss_real, loss_fake, cost, delta, slope_at, margin, slope, ACC)


@triton.jit
def pairwise_cost_backward_kernel(grad_cost, slope_at, grad_real, grad_fake, rows, BLOCK: tl.constexpr):
    g = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = g < rows
    grad = tl.load(grad_cost + g, mask=exists) * tl.load(slope_at + g, mask=exists)
    tl.store(grad_real + g, grad, mask=exists)
    tl.store(grad_fake + g, -grad, mask=exists)


def pairwise_cost(
    real: Tensor, fake: Tensor, loss_real: Tensor, loss_fake: Tensor, margin: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    if real.numel() == 0:
        return reference.pairwise_cost(real, fake, loss_real, loss_fake, margin, slope)
    batch, dtype = real.shape[0], accumulation_dtype(real.dtype)
    cost, delta, slope_at = results = tuple(real.new_empty(batch, dtype=dtype) for _ in range(3))
    inputs, numbers, acc = (loss_real, loss_fake), (margin, slope), accumulation(real)
    t = tiling(batch, real.numel() // batch)
    split = t.splits > 1
    partial = real.new_empty(t.groups * t.splits if split else 0, dtype=dtype)
    launch(
        pairwise_cost_kernel,
        t.group_tiles * t.splits,
        real,
        fake,
        *inputs,
        *results,
        partial,
        t.outer,
        t.reduce,
        t.chunk,
        *numbers,
        SPLIT=split,
        ACC=acc,
        BLOCK_G=t.block_g,
        BLOCK_R=t.block_r,
    )
    if split:
        block_s = triton.next_power_of_2(t.splits)
        block_g = min(triton.next_power_of_2(batch), max(1, TILE // 2 // block_s))
        sizes = (batch, t.splits)
        programs = triton.cdiv(batch, block_g)
        kernel = pairwise_cost_combine_kernel
        blocks = {"BLOCK_G": block_g, "BLOCK_S": block_s}
        launch(kernel, programs, partial, *inputs, *results, *sizes, *numbers, ACC=acc, **blocks)
    return cost, delta, slope_at


def pairwise_cost_backward(grad_cost: Tensor, slope_at: Tensor) -> tuple[Tensor, Tensor]:
    grad_real, grad_fake = torch.empty_like(slope_at), torch.empty_like(slope_at)
    batch = slope_at.numel()
    if batch:
        block = min(TILE, triton.next_power_of_2(batch))
        programs = triton.cdiv(batch, block)
        launch(pairwise_cost_backward_kernel, programs, grad_cost, slope_at, grad_real, grad_fake, batch, BLOCK=block)
    return grad_real, grad_fake
