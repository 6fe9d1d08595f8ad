"""The kernels of norm_act in Triton; `triton.py` launches them. Notation as in `reference.py`.

A tile has the shape (BLOCK_N, GROUPS, PART, BLOCK_S): samples, groups of channels, channels of each, pixels. LAST: the
channels lie innermost in memory. BATCH: the statistics of a batch, where every channel is a group and PER_GROUP is 1.
The sums of a group are those of a, xh a, b, xh b and a b; for BATCH with a0 in the place of a, as the gradients in
weight and bias want them. Without a tangent only the first two count.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _groups_of_tile(c_block, PER_GROUP: tl.constexpr, PART: tl.constexpr, GROUPS: tl.constexpr):
    return c_block // tl.cdiv(PER_GROUP, PART) * GROUPS + tl.arange(0, GROUPS)[None, :, None, None]


@triton.jit
def _channels_of_tile(c_block, groups, PER_GROUP: tl.constexpr, PART: tl.constexpr, GROUPS: tl.constexpr):
    """The channels of a tile, and which of them exist."""
    g = _groups_of_tile(c_block, PER_GROUP, PART, GROUPS)
    of_group = c_block % tl.cdiv(PER_GROUP, PART) * PART + tl.arange(0, PART)[None, None, :, None]
    return g * PER_GROUP + of_group, (g < groups) & (of_group < PER_GROUP)


@triton.jit
def _statistics_of_tile(
    mean,
    rstd,
    n_block,
    c_block,
    batch,
    groups,
    BATCH: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The mean and rstd of a tile's groups, where they lie, and which of them exist."""
    g = _groups_of_tile(c_block, PER_GROUP, PART, GROUPS)
    if BATCH:
        index, exists = g, g < groups
    else:
        n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None, None]
        index, exists = n.to(tl.int64) * groups + g, (n < batch) & (g < groups)
    m, r = tl.load(mean + index, mask=exists, other=0.0), tl.load(rstd + index, mask=exists, other=0.0)
    return m, r, index, exists


@triton.jit
def _elements(
    n_block,
    s_block,
    c,
    c_exists,
    batch,
    pixels,
    channels,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Offsets and mask of a tile."""
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None, None]
    s = s_block * BLOCK_S + tl.arange(0, BLOCK_S)[None, None, None, :]
    n_wide = n.to(tl.int64)
    offset = (n_wide * pixels + s) * channels + c if LAST else (n_wide * channels + c) * pixels + s
    return offset, (n < batch) & c_exists & (s < pixels)


@triton.jit
def _total(v):
    return tl.sum(v, 3, keep_dims=True)


@triton.jit
def _group_sum(v, BATCH: tl.constexpr):
    """The sum over each group of a tile."""
    return tl.sum(_total(v), 0 if BATCH else 2, keep_dims=True)


@triton.jit
def _load_gamma(weight, c, c_exists, ACC: tl.constexpr):
    gamma = tl.full((1, 1, 1, 1), 1.0, ACC)
    if weight is not None:
        gamma = tl.load(weight + c, mask=c_exists, other=0.0)
    return gamma


@triton.jit
def _load_tile(grad_out, x, z, tangent, offset, mask, m, r, slope, ACC: tl.constexpr):
    """act', a0, xh, and b, which is a0 again where there is no tangent."""
    act = tl.full((1, 1, 1, 1), 1.0, ACC)
    if z is not None:
        act = tl.where(tl.load(z + offset, mask=mask, other=0.0).to(ACC) > 0, act, tl.full((), slope, ACC))
    a0 = act * tl.load(grad_out + offset, mask=mask, other=0.0).to(ACC)
    xh = (tl.load(x + offset, mask=mask, other=0.0).to(ACC) - m) * r
    b = a0
    if tangent is not None:
        b = tl.load(tangent + offset, mask=mask, other=0.0).to(ACC)
    return act, a0, xh, b


@triton.jit
def _coefficients(sums, gamma, scale, BATCH: tl.constexpr):
    """m(a), k_a, m(b), k_b and Q."""
    a, ax, b, bx, ab = sums
    scale = tl.full((), scale, a.dtype)
    m_a, k_a, m_b, k_b = a * scale, ax * scale, b * scale, bx * scale
    q = ab * scale - m_a * m_b - k_a * k_b
    if BATCH:
        m_a, k_a, q = gamma * m_a, gamma * k_a, gamma * q
    return m_a, k_a, m_b, k_b, q


@triton.jit
def _store_tile(tile, gamma, r, coefficients, out, out_tangent, offset, mask):
    """Stores the results of a tile; what its elements contribute to the gradient in weight."""
    act, a0, xh, b = tile
    m_a, k_a, m_b, k_b, q = coefficients
    a_centred = gamma * a0 - m_a - xh * k_a
    if out_tangent is None:
        tl.store(out + offset, r * a_centred, mask=mask)
        in_weight = a0 * xh
    else:
        b_centred = b - m_b - xh * k_b
        tl.store(out_tangent + offset, act * gamma * r * b_centred, mask=mask)
        tl.store(out + offset, -(r * r) * (q * xh + k_a * b_centred + k_b * a_centred), mask=mask)
        in_weight = r * a0 * b_centred
    return in_weight


@triton.jit
def _store_affine_of_batch(sums, rstd, index, exists, scale, in_weight, in_bias):
    """The gradients in weight and bias for BATCH; the former alone, of the second derivative, where in_bias is None."""
    a, ax, b, bx, ab = sums
    if in_bias is not None:
        tl.store(in_weight + index, ax, mask=exists)
        tl.store(in_bias + index, a, mask=exists)
    else:
        r = tl.load(rstd + index, mask=exists, other=0.0)
        tl.store(in_weight + index, r * (ab - (a * b + ax * bx) * tl.full((), scale, a.dtype)), mask=exists)


@triton.jit
def _channel_sum(v):
    return tl.sum(_total(v), 0, keep_dims=True)


@triton.jit
def _store_affine(weight_acc, bias_acc, row, c, c_exists, channels, in_weight, in_bias):
    """Row `row` of the sums that make the gradients in weight and bias; these themselves where it is the only one."""
    at = tl.cast(row, tl.int64) * channels + c
    tl.store(in_weight + at, _channel_sum(weight_acc), mask=c_exists)
    if in_bias is not None:
        tl.store(in_bias + at, _channel_sum(bias_acc), mask=c_exists)


@triton.jit(do_not_specialize=["n_steps"])
def norm_act_whole_kernel(
    x,
    grad_out,
    z,
    mean,
    rstd,
    weight,
    tangent,
    out,
    out_tangent,
    in_weight,
    in_bias,
    batch,
    pixels,
    groups,
    n_steps,
    scale: tl.float64,
    slope: tl.float64,
    BATCH: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """All results, where a tile holds its groups whole. A program walks `n_steps` tiles of the same channels."""
    c_blocks = tl.cdiv(groups, GROUPS)
    c_block, row = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks
    channels = PER_GROUP * groups
    c, c_exists = _channels_of_tile(c_block, groups, PER_GROUP, PART, GROUPS)
    gamma = _load_gamma(weight, c, c_exists, ACC)
    weight_acc = tl.zeros((BLOCK_N, GROUPS, PART, BLOCK_S), ACC)
    bias_acc = weight_acc
    for n_block in range(row * n_steps, tl.minimum((row + 1) * n_steps, tl.cdiv(batch, BLOCK_N))):
        m, r, index, exists = _statistics_of_tile(
            mean, rstd, n_block, c_block, batch, groups, BATCH, PER_GROUP, PART, GROUPS, BLOCK_N
        )
        offset, mask = _elements(n_block, 0, c, c_exists, batch, pixels, channels, LAST, BLOCK_N, BLOCK_S)
        act, a0, xh, b = _load_tile(grad_out, x, z, tangent, offset, mask, m, r, slope, ACC)
        a = a0 if BATCH else gamma * a0
        sum_a, sum_ax = _group_sum(a, BATCH), _group_sum(a * xh, BATCH)
        sums = (sum_a, sum_ax, sum_a, sum_ax, sum_a)
        if tangent is not None:
            sum_b, sum_bx = _group_sum(b, BATCH), _group_sum(b * xh, BATCH)
            sums = (sum_a, sum_ax, sum_b, sum_bx, _group_sum(a * b, BATCH))
        coefficients = _coefficients(sums, gamma, scale, BATCH)
        weight_acc += _store_tile((act, a0, xh, b), gamma, r, coefficients, out, out_tangent, offset, mask)
        bias_acc += a0
        if BATCH and in_weight is not None:
            _store_affine_of_batch(sums, rstd, index, exists, scale, in_weight, in_bias)
    if in_weight is not None and not BATCH:
        _store_affine(weight_acc, bias_acc, row, c, c_exists, channels, in_weight, in_bias)


@triton.jit(do_not_specialize=["chunk", "splits"])
def norm_act_sums_kernel(
    x,
    grad_out,
    z,
    mean,
    rstd,
    weight,
    tangent,
    partial,
    batch,
    pixels,
    groups,
    chunk,
    splits,
    slope: tl.float64,
    BATCH: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """What `chunk` tiles of the same groups contribute to their sums."""
    g_blocks, c_blocks, s_blocks = tl.cdiv(groups, GROUPS), tl.cdiv(PER_GROUP, PART), tl.cdiv(pixels, BLOCK_S)
    g_block, rest = tl.program_id(0) % g_blocks, tl.program_id(0) // g_blocks
    split, n_block = rest % splits, rest // splits
    c_block = g_block * c_blocks
    m, r, index, exists = _statistics_of_tile(
        mean, rstd, n_block, c_block, batch, groups, BATCH, PER_GROUP, PART, GROUPS, BLOCK_N
    )
    a_acc = tl.zeros((BLOCK_N, GROUPS, PART, BLOCK_S), ACC)
    ax_acc, b_acc, bx_acc, ab_acc = a_acc, a_acc, a_acc, a_acc
    tiles = (tl.cdiv(batch, BLOCK_N) if BATCH else c_blocks) * s_blocks
    first = split * chunk
    row, s_block = first // s_blocks, first % s_blocks
    for _ in range(first, tl.minimum(first + chunk, tiles)):
        c, c_exists = _channels_of_tile(c_block if BATCH else c_block + row, groups, PER_GROUP, PART, GROUPS)
        offset, mask = _elements(
            row if BATCH else n_block,
            s_block,
            c,
            c_exists,
            batch,
            pixels,
            PER_GROUP * groups,
            LAST,
            BLOCK_N,
            BLOCK_S,
        )
        _, a, xh, b = _load_tile(grad_out, x, z, tangent, offset, mask, m, r, slope, ACC)
        if not BATCH:
            a *= _load_gamma(weight, c, c_exists, ACC)
        a_acc += a
        ax_acc += a * xh
        if tangent is not None:
            b_acc += b
            bx_acc += b * xh
            ab_acc += a * b
        s_block += 1
        row += (s_block == s_blocks).to(tl.int32)
        s_block = tl.where(s_block == s_blocks, 0, s_block)
    if tangent is None:
        at = partial + (index * splits + split) * 2
    else:
        at = partial + (index * splits + split) * 5
        tl.store(at + 2, _group_sum(b_acc, BATCH), mask=exists)
        tl.store(at + 3, _group_sum(bx_acc, BATCH), mask=exists)
        tl.store(at + 4, _group_sum(ab_acc, BATCH), mask=exists)
    tl.store(at, _group_sum(a_acc, BATCH), mask=exists)
    tl.store(at + 1, _group_sum(ax_acc, BATCH), mask=exists)


@triton.jit
def _combined(partial, index, exists, splits, SECOND: tl.constexpr, BLOCK_SPLIT: tl.constexpr):
    """The sums of each group, from what the programs of norm_act_sums_kernel left."""
    lane = tl.arange(0, BLOCK_SPLIT)[None, None, None, :]
    a = tl.zeros((index.shape[0], index.shape[1], 1, BLOCK_SPLIT), partial.dtype.element_ty)
    ax, b, bx, ab = a, a, a, a
    for first in range(0, splits, BLOCK_SPLIT):
        at = partial + (index * splits + first + lane) * (5 if SECOND else 2)
        mask = exists & (first + lane < splits)
        a += tl.load(at, mask=mask, other=0.0)
        ax += tl.load(at + 1, mask=mask, other=0.0)
        if SECOND:
            b += tl.load(at + 2, mask=mask, other=0.0)
            bx += tl.load(at + 3, mask=mask, other=0.0)
            ab += tl.load(at + 4, mask=mask, other=0.0)
    return _total(a), _total(ax), _total(b), _total(bx), _total(ab)


@triton.jit(do_not_specialize=["n_steps", "s_steps", "splits"])
def norm_act_apply_kernel(
    x,
    grad_out,
    z,
    mean,
    rstd,
    weight,
    tangent,
    partial,
    out,
    out_tangent,
    in_weight,
    in_bias,
    batch,
    pixels,
    groups,
    n_steps,
    s_steps,
    splits,
    scale: tl.float64,
    slope: tl.float64,
    BATCH: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_SPLIT: tl.constexpr,
):
    """The results, from the sums of the groups. A program walks `n_steps` by `s_steps` tiles of the same channels."""
    c_blocks = tl.cdiv(groups, GROUPS) * tl.cdiv(PER_GROUP, PART)
    n_blocks, s_blocks = tl.cdiv(batch, BLOCK_N), tl.cdiv(pixels, BLOCK_S)
    c_block, row = tl.program_id(0) % c_blocks, tl.program_id(0) // c_blocks
    s_first = row % tl.cdiv(s_blocks, s_steps) * s_steps
    n_first = row // tl.cdiv(s_blocks, s_steps) * n_steps
    channels = PER_GROUP * groups
    c, c_exists = _channels_of_tile(c_block, groups, PER_GROUP, PART, GROUPS)
    gamma = _load_gamma(weight, c, c_exists, ACC)
    if BATCH:
        m, r, index, exists = _statistics_of_tile(
            mean, rstd, 0, c_block, batch, groups, BATCH, PER_GROUP, PART, GROUPS, BLOCK_N
        )
        sums = _combined(partial, index, exists, splits, tangent is not None, BLOCK_SPLIT)
        coefficients = _coefficients(sums, gamma, scale, BATCH)
        if in_weight is not None:
            _store_affine_of_batch(sums, rstd, index, exists & (row == 0), scale, in_weight, in_bias)
    weight_acc = tl.zeros((BLOCK_N, GROUPS, PART, BLOCK_S), ACC)
    bias_acc = weight_acc
    for n_block in range(n_first, tl.minimum(n_first + n_steps, n_blocks)):
        if not BATCH:
            m, r, index, exists = _statistics_of_tile(
                mean, rstd, n_block, c_block, batch, groups, BATCH, PER_GROUP, PART, GROUPS, BLOCK_N
            )
            sums = _combined(partial, index, exists, splits, tangent is not None, BLOCK_SPLIT)
            coefficients = _coefficients(sums, gamma, scale, BATCH)
        for s_block in range(s_first, tl.minimum(s_first + s_steps, s_blocks)):
            offset, mask = _elements(n_block, s_block, c, c_exists, batch, pixels, channels, LAST, BLOCK_N, BLOCK_S)
            tile = _load_tile(grad_out, x, z, tangent, offset, mask, m, r, slope, ACC)
            weight_acc += _store_tile(tile, gamma, r, coefficients, out, out_tangent, offset, mask)
            bias_acc += tile[1]
    if in_weight is not None and not BATCH:
        _store_affine(weight_acc, bias_acc, row, c, c_exists, channels, in_weight, in_bias)


@triton.jit(do_not_specialize=["rows"])
def norm_act_affine_kernel(
    weight_rows,
    bias_rows,
    in_weight,
    in_bias,
    rows,
    channels,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients in weight and bias, the sums over the rows that the programs of another kernel left."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    weight_acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    bias_acc = weight_acc
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)[:, None]
        at, mask = tl.cast(row, tl.int64) * channels + c, (row < rows) & (c < channels)
        weight_acc += tl.load(weight_rows + at, mask=mask, other=0.0)
        if in_bias is not None:
            bias_acc += tl.load(bias_rows + at, mask=mask, other=0.0)
    tl.store(in_weight + c, tl.sum(weight_acc, 0)[None, :], mask=c < channels)
    if in_bias is not None:
        tl.store(in_bias + c, tl.sum(bias_acc, 0)[None, :], mask=c < channels)
