"""interpolate in Triton: one launch that reads real and fake and writes the result, eps drawn on the way."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpkernels.ops._triton import Tiling, accumulation, group_tile, launch, tiling, uniform_at, uniform_block

_GIVEN, _PER_SAMPLE, _PER_ELEMENT = range(3)


@triton.jit
def _tile(pid, rows, n, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows, columns, offsets and mask of a program's tile."""
    per_row = tl.cdiv(n, BLOCK_R)
    g, base, exists = group_tile(pid // per_row, rows, n, 1, False, BLOCK_G)
    first = (pid % per_row).to(tl.int64) * BLOCK_R
    r = first + tl.arange(0, BLOCK_R)
    return g, exists, first, base[:, None] + r[None, :], exists[:, None] & (r < n)[None, :]


@triton.jit
def _weights(eps, seed, g, exists, first, SOURCE: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr):
    """eps of a tile, (BLOCK_G, 1) or, per element, (1, BLOCK_R)."""
    if SOURCE == 0:
        e = tl.load(eps + g, mask=exists, other=0.0)[:, None]
    elif SOURCE == 1:
        e = uniform_at(seed, g).to(ACC)[:, None]
    else:
        e = uniform_block(seed, first, BLOCK_R).to(ACC)[None, :]
    return e


@triton.jit
def interpolate_kernel(
    real,
    fake,
    out,
    eps,
    seed,
    rows,
    n,
    SOURCE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    g, exists, first, offset, mask = _tile(tl.program_id(0), rows, n, BLOCK_G, BLOCK_R)
    x = tl.load(real + offset, mask=mask).to(ACC)
    y = tl.load(fake + offset, mask=mask).to(ACC)
    e = _weights(eps, seed, g, exists, first, SOURCE, ACC, BLOCK_R)
    tl.store(out + offset, e * x + (1.0 - e) * y, mask=mask)


@triton.jit
def interpolate_backward_kernel(
    grad_out,
    grad_real,
    grad_fake,
    eps,
    seed,
    rows,
    n,
    SOURCE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    g, exists, first, offset, mask = _tile(tl.program_id(0), rows, n, BLOCK_G, BLOCK_R)
    x = tl.load(grad_out + offset, mask=mask).to(ACC)
    e = _weights(eps, seed, g, exists, first, SOURCE, ACC, BLOCK_R)
    if grad_real is not None:
        tl.store(grad_real + offset, e * x, mask=mask)
    if grad_fake is not None:
        tl.store(grad_fake + offset, (1.0 - e) * x, mask=mask)


def _source(x: Tensor, eps: Tensor | None, per_element: bool) -> tuple[int, Tiling]:
    """Where eps comes from, and the tiling: by sample, or flat where every element has its own."""
    if per_element:
        t = tiling(1, max(4, x.numel()))  # a tile takes whole Philox blocks
        return _PER_ELEMENT, t._replace(reduce=x.numel())
    return _GIVEN if eps is not None else _PER_SAMPLE, tiling(x.shape[0], x.numel() // x.shape[0])


def interpolate(real: Tensor, fake: Tensor, eps: Tensor | None, seed: Tensor | None, per_element: bool) -> Tensor:
    out = torch.empty_like(real)
    if out.numel() == 0:
        return out
    source, t = _source(real, eps, per_element)
    launch(
        interpolate_kernel,
        t.tiles,
        real,
        fake,
        out,
        eps,
        seed,
        t.outer,
        t.reduce,
        SOURCE=source,
        ACC=accumulation(real),
        BLOCK_G=t.block_g,
        BLOCK_R=t.block_r,
    )
    return out


def interpolate_backward(
    grad_out: Tensor,
    eps: Tensor | None,
    seed: Tensor | None,
    per_element: bool,
    need_real: bool,
    need_fake: bool,
) -> tuple[Tensor, Tensor]:
    grad_real, grad_fake = (
        torch.empty_like(grad_out) if need else grad_out.new_empty(0) for need in (need_real, need_fake)
    )
    if grad_out.numel() == 0 or not (need_real or need_fake):
        return grad_real, grad_fake
    source, t = _source(grad_out, eps, per_element)
    launch(
        interpolate_backward_kernel,
        t.tiles,
        grad_out,
        grad_real if need_real else None,
        grad_fake if need_fake else None,
        eps,
        seed,
        t.outer,
        t.reduce,
        SOURCE=source,
        ACC=accumulation(grad_out),
        BLOCK_G=t.block_g,
        BLOCK_R=t.block_r,
    )
    return grad_real, grad_fake
