"""The kernels of spectral_norm that scale weights, and those of the gradient. Notation as in `_triton_kernels.py`."""

# mypy: allow-untyped-defs
# ruff: noqa: RUF059  # tuples that kernels share, of which each needs a part

from __future__ import annotations

import triton
import triton.language as tl

from gpkernels.ops._triton import divide
from gpkernels.ops.spectral_norm._triton_kernels import (
    FIELDS,
    columns_of,
    is_wide,
    pointer_of,
    rows_of,
    sum_of,
    tile_of,
    wide_pointer_of,
)


@triton.jit
def _steps(tile, BLOCK_R: tl.constexpr):
    """The first row of a tile, the first behind it, and how often to read."""
    rows, columns, inner, row_tile, row_index, column_index = tile
    row, end = row_index * row_tile, tl.minimum((row_index + 1) * row_tile, rows)
    return row, end, tl.cdiv(end - row, BLOCK_R)


@triton.jit
def _scale(weight, out, tile, factor, ACC: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    rows, columns, inner, row_tile, row_index, column_index = tile
    c, c_at, c_exists = columns_of(columns, inner, rows, column_index, W, BLOCK_C)
    row, end, steps = _steps(tile, BLOCK_R)
    for step in range(0, steps):
        r, r_at, exists = rows_of(row, end, step, inner, W, BLOCK_R)
        at, mask = r_at[:, None] + c_at[None, :], exists[:, None] & c_exists[None, :]
        tl.store(out + at, factor * tl.load(weight + at, mask=mask, other=0.0).to(ACC), mask=mask)


@triton.jit
def spectral_norm_scale_kernel(
    sigma,
    table,
    layers,
    targets,
    weights,
    outs,
    eps: tl.float64,
    ACC: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """target W / sigma, or target W where sigma is at most eps."""
    layer, _, _, tile = tile_of(table, layers, BLOCK_C)
    rows, columns, inner, row_tile, row_index, column_index = tile
    s, target = tl.load(sigma + layer), tl.load(targets + layer).to(ACC)
    factor = divide(target, tl.where(s <= tl.full((), eps, ACC), 1.0, s))
    if is_wide(weights, layer, inner, W) & is_wide(outs, layer, inner, W):
        weight, out = wide_pointer_of(weights, layer, W), wide_pointer_of(outs, layer, W)
        _scale(weight, out, tile, factor, ACC, W, BLOCK_R, BLOCK_C)
    else:
        _scale(pointer_of(weights, layer), pointer_of(outs, layer), tile, factor, ACC, 1, BLOCK_R, BLOCK_C)


@triton.jit
def _dot(grad, weight, tile, ACC: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    rows, columns, inner, row_tile, row_index, column_index = tile
    c, c_at, c_exists = columns_of(columns, inner, rows, column_index, W, BLOCK_C)
    row, end, steps = _steps(tile, BLOCK_R)
    acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for step in range(0, steps):
        r, r_at, exists = rows_of(row, end, step, inner, W, BLOCK_R)
        at, mask = r_at[:, None] + c_at[None, :], exists[:, None] & c_exists[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        acc += g * tl.load(weight + at, mask=mask, other=0.0).to(ACC)
    return tl.sum(tl.sum(acc, 1), 0)


@triton.jit
def spectral_norm_dot_kernel(
    memory,
    table,
    layers,
    grads,
    weights,
    ACC: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The parts of <G, W>, a tile each."""
    layer, _, _, tile = tile_of(table, layers, BLOCK_C)
    rows, columns, inner, row_tile, row_index, column_index = tile
    if is_wide(grads, layer, inner, W) & is_wide(weights, layer, inner, W):
        grad, weight = wide_pointer_of(grads, layer, W), wide_pointer_of(weights, layer, W)
        part = _dot(grad, weight, tile, ACC, W, BLOCK_R, BLOCK_C)
    else:
        part = _dot(pointer_of(grads, layer), pointer_of(weights, layer), tile, ACC, 1, BLOCK_R, BLOCK_C)
    tl.store(memory + tl.program_id(0), part)


@triton.jit
def _grad(
    grad,
    out,
    left,
    right,
    tile,
    factor,
    along,
    ACC: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, columns, inner, row_tile, row_index, column_index = tile
    c, c_at, c_exists = columns_of(columns, inner, rows, column_index, W, BLOCK_C)
    row, end, steps = _steps(tile, BLOCK_R)
    across = along * tl.load(right + c, mask=c_exists, other=0.0)
    for step in range(0, steps):
        r, r_at, exists = rows_of(row, end, step, inner, W, BLOCK_R)
        at, mask = r_at[:, None] + c_at[None, :], exists[:, None] & c_exists[None, :]
        g = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
        down = tl.load(left + r, mask=exists, other=0.0)
        tl.store(out + at, factor * (g - down[:, None] * across[None, :]), mask=mask)


@triton.jit
def spectral_norm_grad_kernel(
    memory,
    table,
    layers,
    targets,
    sigma,
    grads,
    outs,
    u,
    v,
    eps: tl.float64,
    ACC: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target (G - <G, W> / sigma u v^T) / sigma, or target G where sigma is at most eps."""
    layer, swapped, _, tile = tile_of(table, layers, BLOCK_C)
    rows, columns, inner, row_tile, row_index, column_index = tile
    first = tl.load(table + layer * FIELDS + 5)
    dot = sum_of(memory + first, tl.cdiv(rows, row_tile) * tl.cdiv(columns, BLOCK_C), BLOCK)
    s, target = tl.load(sigma + layer), tl.load(targets + layer).to(ACC)
    dead = s <= tl.full((), eps, ACC)
    safe = tl.where(dead, 1.0, s)
    factor, along = divide(target, safe), tl.where(dead, 0.0, divide(dot, safe))
    left, right = pointer_of(u, layer), pointer_of(v, layer)
    if swapped != 0:
        left, right = right, left
    if is_wide(grads, layer, inner, W) & is_wide(outs, layer, inner, W):
        grad, out = wide_pointer_of(grads, layer, W), wide_pointer_of(outs, layer, W)
        _grad(grad, out, left, right, tile, factor, along, ACC, W, BLOCK_R, BLOCK_C)
    else:
        grad, out = pointer_of(grads, layer), pointer_of(outs, layer)
        _grad(grad, out, left, right, tile, factor, along, ACC, 1, BLOCK_R, BLOCK_C)
