"""The kernels of spectral_norm in Triton; `triton.py` launches them, and says what the tables hold.

A weight is walked as rows of contiguous memory: element (r, c) lies at (c // inner * rows + r) * inner + c % inner. It
is W, or where the rows of W lie innermost its transpose (`swapped`). A program has a tile of `row_tile` rows and
BLOCK_C columns, of which it reads BLOCK_R rows at a time. W: how many elements side by side make 16 bytes.
"""

# mypy: allow-untyped-defs
# ruff: noqa: RUF059  # tuples that kernels share, of which each needs a part

from __future__ import annotations

import triton
import triton.language as tl

from gpkernels.ops._triton import divide, root

FIELDS = tl.constexpr(8)

BY_U, BY_V, BY_BOTH = (tl.constexpr(code) for code in range(3))
"""What a launch multiplies with: u or v as they are; or both t = W^T u, from its parts, and v as it was, which stays
where ||t|| is too small to tell."""


@triton.jit
def _distance(pointers, layer):
    """From the first tensor to a layer's, in bytes."""
    first = pointers[0].to(tl.int64)
    distance = first - first
    for i in tl.static_range(1, len(pointers)):
        distance = tl.where(layer == i, pointers[i].to(tl.int64) - first, distance)
    return distance


@triton.jit
def pointer_of(pointers, layer):
    """A layer's tensor."""
    return pointers[0] + _distance(pointers, layer) // (pointers[0].dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def wide_pointer_of(pointers, layer, W: tl.constexpr):
    """A layer's tensor, which lies a multiple of 16 bytes behind the first; W = 1: at any distance."""
    if W == 1:
        return pointer_of(pointers, layer)
    return pointers[0] + _distance(pointers, layer) // 16 * W


@triton.jit
def is_wide(pointers, layer, inner, W: tl.constexpr):
    return (_distance(pointers, layer) % 16 == 0) & (inner % W == 0)


@triton.jit
def _walk(table, layer):
    """rows, columns, inner, swapped, row_tile, the first program, where the scratch memory begins; the table's last
    field is where copies of u, then v, begin among those of all layers."""
    at = table + layer * FIELDS
    rows, columns, inner = tl.load(at).to(tl.int32), tl.load(at + 1).to(tl.int32), tl.load(at + 2).to(tl.int32)
    return rows, columns, inner, tl.load(at + 3), tl.load(at + 4).to(tl.int32), tl.load(at + 5), tl.load(at + 6)


@triton.jit
def tile_of(table, layers, BLOCK_C: tl.constexpr):
    """A program's layer, whether it is swapped, its scratch memory, and the tile: which of the layer's it is, and the
    sizes."""
    layer = tl.load(layers + tl.program_id(0))
    rows, columns, inner, swapped, row_tile, block, scratch = _walk(table, layer)
    index, column_tiles = (tl.program_id(0) - block).to(tl.int32), tl.cdiv(columns, BLOCK_C)
    return layer, swapped, scratch, (rows, columns, inner, row_tile, index // column_tiles, index % column_tiles)


@triton.jit
def _places(rows, columns, row_tile, BY_COLUMNS, BLOCK_C: tl.constexpr):
    """Of W^T u (BY_COLUMNS where W is as it is in memory), or of W v: into how many parts it is added up, and the
    length of each."""
    row_tiles, column_tiles = tl.cdiv(rows, row_tile), tl.cdiv(columns, BLOCK_C)
    return tl.where(BY_COLUMNS, row_tiles, column_tiles), tl.where(BY_COLUMNS, columns, rows)


@triton.jit
def _memory(memory, scratch, rows, columns, row_tile, swapped, BLOCK_C: tl.constexpr):
    """A layer's scratch memory: the parts of t = W^T u, t, the parts of ||t||^2, those of W t, or of W v alone, and
    those of W v; and how many parts of what length t and the images W t and W v have."""
    t_parts, t_length = _places(rows, columns, row_tile, swapped == 0, BLOCK_C)
    parts, length = _places(rows, columns, row_tile, swapped != 0, BLOCK_C)
    first = memory + scratch
    t = first + t_parts.to(tl.int64) * t_length
    squares = t + t_length
    images = squares + parts
    return first, t, squares, images, images + parts.to(tl.int64) * length, t_parts, t_length, parts, length


@triton.jit
def columns_of(columns, inner, rows, column_tile, W: tl.constexpr, BLOCK_C: tl.constexpr):
    """The columns of a tile, where they begin, and which exist."""
    c = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    n = inner // W * W
    return c, (c // n * rows).to(tl.int64) * n + c % n, c < columns // W * W


@triton.jit
def rows_of(first, end, step, inner, W: tl.constexpr, BLOCK_R: tl.constexpr):
    """BLOCK_R rows of a tile, where they begin, and which exist."""
    r = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
    return r, r.to(tl.int64) * (inner // W * W), r < end


@triton.jit
def _factors(first, vector, parts, length, i, exists, BY: tl.constexpr, BLOCK_R: tl.constexpr):
    """Elements i of what is multiplied with."""
    if BY == BY_BOTH:
        p = tl.arange(0, BLOCK_R)[:, None]
        acc = tl.zeros((BLOCK_R, i.shape[0]), first.dtype.element_ty)
        for part in range(0, parts, BLOCK_R):
            at = first + (part + p).to(tl.int64) * length + i[None, :]
            acc += tl.load(at, mask=(part + p < parts) & exists[None, :], other=0.0)
        x = tl.sum(acc, 0)
    else:
        x = tl.load(vector + i, mask=exists, other=0.0)
    return x


@triton.jit
def _add_rows(
    weight, vector, places, tile, ACC: tl.constexpr, BY: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A part of the sum over rows of W[r, c] times factor r."""
    first, t, squares, images, others, t_parts, t_length, parts, length = places
    rows, columns, inner, row_tile, row_index, column_index = tile
    c, c_at, c_exists = columns_of(columns, inner, rows, column_index, W, BLOCK_C)
    row, end = row_index * row_tile, tl.minimum((row_index + 1) * row_tile, rows)
    acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    other, square = acc, tl.zeros((BLOCK_R,), ACC)
    for step in range(0, tl.cdiv(end - row, BLOCK_R)):
        r, r_at, exists = rows_of(row, end, step, inner, W, BLOCK_R)
        mask = exists[:, None] & c_exists[None, :]
        items = tl.load(weight + (r_at[:, None] + c_at[None, :]), mask=mask, other=0.0).to(ACC)
        factor = _factors(first, vector, t_parts, t_length, r, exists, BY, BLOCK_R)
        acc += items * factor[:, None]
        if BY == BY_BOTH:
            other += items * tl.load(vector + r, mask=exists, other=0.0)[:, None]
            square += factor * factor
            tl.store(t + r, factor, mask=exists & (column_index == 0))
    out = first + row_index.to(tl.int64) * t_length
    if BY != BY_U:
        out = images + row_index.to(tl.int64) * length
    tl.store(out + c, tl.sum(acc, 0), mask=c_exists)
    if BY == BY_BOTH:
        tl.store(others + row_index.to(tl.int64) * length + c, tl.sum(other, 0), mask=c_exists)
        tl.store(squares + row_index, tl.sum(square, 0), mask=column_index == 0)


@triton.jit
def _add_columns(
    weight, vector, places, tile, ACC: tl.constexpr, BY: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A part of the sum over columns of W[r, c] times factor c."""
    first, t, squares, images, others, t_parts, t_length, parts, length = places
    rows, columns, inner, row_tile, row_index, column_index = tile
    c, c_at, c_exists = columns_of(columns, inner, rows, column_index, W, BLOCK_C)
    row, end = row_index * row_tile, tl.minimum((row_index + 1) * row_tile, rows)
    factor = _factors(first, vector, t_parts, t_length, c, c_exists, BY, BLOCK_R)
    out = first + column_index.to(tl.int64) * t_length
    if BY != BY_U:
        out = images + column_index.to(tl.int64) * length
    if BY == BY_BOTH:
        tl.store(t + c, factor, mask=c_exists & (row_index == 0))
        tl.store(squares + column_index, tl.sum(factor * factor, 0), mask=row_index == 0)
    for step in range(0, tl.cdiv(end - row, BLOCK_R)):
        r, r_at, exists = rows_of(row, end, step, inner, W, BLOCK_R)
        mask = exists[:, None] & c_exists[None, :]
        items = tl.load(weight + (r_at[:, None] + c_at[None, :]), mask=mask, other=0.0).to(ACC)
        tl.store(out + r, tl.sum(items * factor[None, :], 1), mask=exists)
        if BY == BY_BOTH:
            v = tl.load(vector + c, mask=c_exists, other=0.0)
            tl.store(others + column_index.to(tl.int64) * length + r, tl.sum(items * v[None, :], 1), mask=exists)


@triton.jit
def spectral_norm_product_kernel(
    memory,
    table,
    layers,
    weights,
    vectors,
    ACC: tl.constexpr,
    BY: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The parts of W^T u, or of W v, a tile each; for BY_BOTH also t and the parts of ||t||^2."""
    layer, swapped, scratch, tile = tile_of(table, layers, BLOCK_C)
    rows, columns, inner, row_tile, row_index, column_index = tile
    places = _memory(memory, scratch, rows, columns, row_tile, swapped, BLOCK_C)
    vector, wide = pointer_of(vectors, layer), is_wide(weights, layer, inner, W)
    if (swapped == 0) == (BY == BY_U):
        if wide:
            _add_rows(wide_pointer_of(weights, layer, W), vector, places, tile, ACC, BY, W, BLOCK_R, BLOCK_C)
        else:
            _add_rows(pointer_of(weights, layer), vector, places, tile, ACC, BY, 1, BLOCK_R, BLOCK_C)
    else:
        if wide:
            _add_columns(wide_pointer_of(weights, layer, W), vector, places, tile, ACC, BY, W, BLOCK_R, BLOCK_C)
        else:
            _add_columns(pointer_of(weights, layer), vector, places, tile, ACC, BY, 1, BLOCK_R, BLOCK_C)


@triton.jit
def sum_of(x, count, BLOCK: tl.constexpr):
    """The sum of `count` numbers."""
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), x.dtype.element_ty)
    for i in range(0, count, BLOCK):
        acc += tl.load(x + i + lane, mask=i + lane < count, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def spectral_norm_finish_kernel(
    memory,
    table,
    layers,
    u,
    v,
    sigma,
    copies,
    eps: tl.float64,
    ITERATION: tl.constexpr,
    COPY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """After W v: of each layer one program for u and sigma and further ones for v."""
    layer, index = tl.load(layers + 2 * tl.program_id(0)), tl.load(layers + 2 * tl.program_id(0) + 1)
    rows, columns, inner, swapped, row_tile, block, scratch = _walk(table, layer)
    places = _memory(memory, scratch, rows, columns, row_tile, swapped, BLOCK_C)
    first, t, squares, images, others, t_parts, t_length, parts, length = places
    least, lane = tl.full((), eps, ACC), tl.arange(0, BLOCK)
    norm = tl.full((), 0.0, ACC)
    if ITERATION:
        norm = root(sum_of(squares, parts, BLOCK))
    moved = norm > least
    divisor = tl.where(moved, norm, 1.0)
    copy = copies + tl.load(table + layer * FIELDS + 7)
    if index > 0:
        i = (index - 1) * BLOCK + lane
        exists = i < tl.where(moved, t_length, 0)
        right = pointer_of(v, layer) + i
        value = divide(tl.load(t + i, mask=exists, other=0.0), divisor)
        if COPY:
            value = tl.where(moved, value, tl.load(right, mask=i < t_length, other=0.0))
            tl.store(copy + (length + 3) // 4 * 4 + i, value, mask=i < t_length)
        tl.store(right, value, mask=exists)
    else:
        image, left = images, pointer_of(u, layer)
        if ITERATION:
            image += tl.where(moved, 0, parts.to(tl.int64) * length)
        p = tl.arange(0, PARTS)[:, None]
        squared, dot = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
        for begin in range(0, length, BLOCK):
            i = begin + lane
            acc = tl.zeros((PARTS, BLOCK), ACC)
            for part in range(0, parts, PARTS):
                at = image + (part + p).to(tl.int64) * length + i[None, :]
                acc += tl.load(at, mask=(part + p < parts) & (i < length)[None, :], other=0.0)
            z = divide(tl.sum(acc, 0), divisor)
            squared += z * z
            dot += z * tl.load(left + i, mask=i < length, other=0.0)
            tl.store(images + i, z, mask=i < length)
        size = root(tl.sum(squared, 0))
        turned = (size > least) if ITERATION else (size < 0)
        tl.store(sigma + layer, tl.where(turned, size, tl.sum(dot, 0)))
        tl.debug_barrier()
        for begin in range(0, length, BLOCK):
            i = begin + lane
            exists = i < tl.where(turned, length, 0)
            value = divide(tl.load(images + i, mask=exists, other=0.0), tl.where(turned, size, 1.0))
            if COPY:
                value = tl.where(turned, value, tl.load(left + i, mask=i < length, other=0.0))
                tl.store(copy + i, value, mask=i < length)
            tl.store(left + i, value, mask=exists)
