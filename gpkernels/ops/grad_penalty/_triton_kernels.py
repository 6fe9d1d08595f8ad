"""The kernels of grad_norm_penalty in Triton; `triton.py` launches them. Notation as in `csrc/cpu/grad_penalty.cpp`."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from gpkernels.ops._triton import L1, L2, LINF, direction, divide, first_over_n, group_tile, order_of, phi, root


@triton.jit
def _elements(first, base, exists, reduce, inner, BLOCK_R: tl.constexpr):
    """Offsets and mask of elements first, ..., first + BLOCK_R - 1 of the groups of a tile."""
    r = first + tl.arange(0, BLOCK_R)
    return base[:, None] + r[None, :] * inner, exists[:, None] & (r < reduce)[None, :]


@triton.jit
def _map_tile(pid, outer, reduce, inner, STRIDED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr):
    """Groups, which of them exist, offsets and mask of the tile of a program that maps elements."""
    blocks = tl.cdiv(reduce, BLOCK_R)
    g, base, exists = group_tile(pid // blocks, outer, reduce, inner, STRIDED, BLOCK_G)
    offset, mask = _elements((pid % blocks).to(tl.int64) * BLOCK_R, base, exists, reduce, inner, BLOCK_R)
    return g, exists, offset, mask


@triton.jit
def _upstream(grad_out, g, exists, weight, NONE: tl.constexpr, ACC: tl.constexpr):
    """p, one a group or one for all."""
    return tl.load(grad_out + g, mask=exists, other=0.0) if NONE else tl.load(grad_out) * tl.full((), weight, ACC)


@triton.jit
def _load_saved(saved, g, exists, groups, NORM: tl.constexpr):
    """The norms of the groups and how many elements share the direction of each."""
    n = tl.load(saved + g, mask=exists, other=0.0)
    ties = tl.full(n.shape, 1, n.dtype)
    if NORM == LINF:
        ties = tl.maximum(tl.load(saved + groups + g, mask=exists, other=1.0), ties)
    return n, ties


@triton.jit
def _finish(total, ties, target, saved, g, exists, groups, FORM: tl.constexpr, NORM: tl.constexpr):
    """Stores the norms of groups whose reduction is complete; their phi."""
    n = total
    if NORM == L2:
        n = root(total)
    tl.store(saved + g, n, mask=exists)
    if NORM == LINF:
        tl.store(saved + groups + g, tl.where(n == n, ties, 0.0), mask=exists)
    return phi(n, target, FORM)[0]


@triton.jit
def grad_norm_penalty_kernel(
    grad,
    saved,
    value,
    partial,
    outer,
    reduce,
    inner,
    chunk,
    target: tl.float64,
    FORM: tl.constexpr,
    NORM: tl.constexpr,
    NONE: tl.constexpr,
    SPLIT: tl.constexpr,
    STRIDED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The norm of each group, or what a split of it contributes; phi of each group, or its sum over the program's."""
    pid = tl.program_id(0)
    splits = tl.cdiv(reduce, chunk)
    groups = tl.cast(outer, tl.int64) * inner
    g, base, exists = group_tile(pid // splits, outer, reduce, inner, STRIDED, BLOCK_G)
    begin = (pid % splits).to(tl.int64) * chunk
    acc = tl.zeros((BLOCK_G, BLOCK_R), ACC)
    ties = tl.zeros((BLOCK_G, BLOCK_R), tl.int32)
    largest = order_of(acc)
    for step in range(0, chunk, BLOCK_R):
        offset, mask = _elements(begin + step, base, exists, reduce, inner, BLOCK_R)
        x = tl.load(grad + offset, mask=mask, other=0.0).to(ACC)
        if NORM == L2:
            acc += x * x
        elif NORM == L1:
            acc += tl.abs(x)
        else:
            order = order_of(x)
            ties = tl.where(order > largest, 1, ties + (mask & (order == largest)).to(tl.int32))
            largest = tl.maximum(order, largest)
    if NORM == LINF:
        top = tl.max(largest, 1)
        count = tl.sum(tl.where(largest == top[:, None], ties, 0).to(tl.int64), 1).to(ACC)
        total = top.to(ACC, bitcast=True)
    else:
        total = tl.sum(acc, 1)
        count = total
    if SPLIT:
        at = g * splits + pid % splits
        tl.store(partial + at, total, mask=exists)
        if NORM == LINF:
            tl.store(partial + groups * splits + at, count, mask=exists)
    else:
        y = _finish(total, count, target, saved, g, exists, groups, FORM, NORM)
        if NONE:
            tl.store(value + g, y, mask=exists)
        else:
            tl.store(partial + pid, tl.sum(tl.where(exists, y, 0.0), 0))


@triton.jit
def grad_norm_penalty_combine_kernel(
    partial,
    saved,
    value,
    groups,
    splits,
    target: tl.float64,
    weight: tl.float64,
    FORM: tl.constexpr,
    NORM: tl.constexpr,
    NONE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Combines the splits of all groups, in one program."""
    s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_G,), ACC)
    for first in range(0, groups, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        exists = g < groups
        mask = exists[:, None] & (s < splits)[None, :]
        at = g[:, None] * splits + s[None, :]
        x = tl.load(partial + at, mask=mask, other=0.0)
        if NORM == LINF:
            count = tl.load(partial + groups * splits + at, mask=mask, other=0.0)
            order = order_of(x)
            top = tl.max(order, 1)
            ties = tl.sum(tl.where(order == top[:, None], count, 0.0), 1)
            total = top.to(ACC, bitcast=True)
        else:
            total = tl.sum(x, 1)
            ties = total
        y = _finish(total, ties, target, saved, g, exists, groups, FORM, NORM)
        if NONE:
            tl.store(value + g, y, mask=exists)
        acc += tl.where(exists, y, 0.0)
    if not NONE:
        tl.store(value, tl.sum(acc, 0) * tl.full((), weight, ACC))


@triton.jit
def grad_norm_penalty_backward_kernel(
    grad_out,
    grad,
    saved,
    out,
    outer,
    reduce,
    inner,
    target: tl.float64,
    weight: tl.float64,
    FORM: tl.constexpr,
    NORM: tl.constexpr,
    NONE: tl.constexpr,
    STRIDED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    g, exists, offset, mask = _map_tile(tl.program_id(0), outer, reduce, inner, STRIDED, BLOCK_G, BLOCK_R)
    x = tl.load(grad + offset, mask=mask, other=0.0).to(ACC)
    n, ties = _load_saved(saved, g, exists, tl.cast(outer, tl.int64) * inner, NORM)
    _, first, second = phi(n, target, FORM)
    slope = first_over_n(first, second, n) if NORM == L2 else divide(first, ties)
    along = _upstream(grad_out, g, exists, weight, NONE, ACC) * slope
    tl.store(out + offset, along[:, None] * direction(x, n[:, None], NORM), mask=mask)


@triton.jit
def _second(dot, p, n, ties, target, FORM: tl.constexpr, NORM: tl.constexpr):
    """The factors of tangent and direction in the derivative in grad, and the derivative in p."""
    _, first, second = phi(n, target, FORM)
    if NORM == L2:
        ratio = first_over_n(first, second, n)
        safe = tl.where(n == 0, 1.0, n)
        along_tangent = p * ratio
        along_direction = tl.where(n == 0, 0.0, divide(p * (second - ratio) * divide(dot, safe), safe))
        in_p = ratio * dot
    else:
        share = divide(dot, ties)
        along_tangent = tl.zeros_like(n)
        along_direction = p * second * divide(share, ties)
        in_p = first * share
    return along_tangent, along_direction, in_p


@triton.jit
def _second_of_tile(x, u, n, along_tangent, along_direction, NORM: tl.constexpr):
    result = along_direction[:, None] * direction(x, n[:, None], NORM)
    if NORM == L2:
        result += along_tangent[:, None] * u
    return result


@triton.jit
def grad_norm_penalty_dot_kernel(
    tangent,
    grad_out,
    grad,
    saved,
    out,
    in_grad_out,
    dots,
    partial,
    outer,
    reduce,
    inner,
    chunk,
    target: tl.float64,
    weight: tl.float64,
    FORM: tl.constexpr,
    NORM: tl.constexpr,
    NONE: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
    STRIDED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """<tangent, direction> of each group, or what a split of it contributes. WHOLE: the tile holds its groups whole,
    and the derivative in grad is written too."""
    pid = tl.program_id(0)
    splits = tl.cdiv(reduce, chunk)
    groups = tl.cast(outer, tl.int64) * inner
    g, base, exists = group_tile(pid // splits, outer, reduce, inner, STRIDED, BLOCK_G)
    n, ties = _load_saved(saved, g, exists, groups, NORM)
    begin = (pid % splits).to(tl.int64) * chunk
    acc = tl.zeros((BLOCK_G, BLOCK_R), ACC)
    if WHOLE:
        offset, mask = _elements(begin, base, exists, reduce, inner, BLOCK_R)
        x = tl.load(grad + offset, mask=mask, other=0.0).to(ACC)
        u = tl.load(tangent + offset, mask=mask, other=0.0).to(ACC)
        acc += u * direction(x, n[:, None], NORM)
    else:
        for step in range(0, chunk, BLOCK_R):
            offset, mask = _elements(begin + step, base, exists, reduce, inner, BLOCK_R)
            x = tl.load(grad + offset, mask=mask, other=0.0).to(ACC)
            u = tl.load(tangent + offset, mask=mask, other=0.0).to(ACC)
            acc += u * direction(x, n[:, None], NORM)
    dot = tl.sum(acc, 1)
    if SPLIT:
        tl.store(partial + g * splits + pid % splits, dot, mask=exists)
    else:
        p = _upstream(grad_out, g, exists, weight, NONE, ACC)
        along_tangent, along_direction, in_p = _second(dot, p, n, ties, target, FORM, NORM)
        if NONE:
            tl.store(in_grad_out + g, in_p, mask=exists)
        else:
            tl.store(partial + pid, tl.sum(tl.where(exists, in_p, 0.0), 0))
        if WHOLE:
            tl.store(out + offset, _second_of_tile(x, u, n, along_tangent, along_direction, NORM), mask=mask)
        else:
            tl.store(dots + g, dot, mask=exists)


@triton.jit
def grad_norm_penalty_combine_dots_kernel(
    partial,
    grad_out,
    saved,
    in_grad_out,
    dots,
    groups,
    splits,
    target: tl.float64,
    weight: tl.float64,
    FORM: tl.constexpr,
    NORM: tl.constexpr,
    NONE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Combines the splits of all groups, in one program."""
    s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_G,), ACC)
    for first in range(0, groups, BLOCK_G):
        g = first + tl.arange(0, BLOCK_G)
        exists = g < groups
        mask = exists[:, None] & (s < splits)[None, :]
        dot = tl.sum(tl.load(partial + g[:, None] * splits + s[None, :], mask=mask, other=0.0), 1)
        n, ties = _load_saved(saved, g, exists, groups, NORM)
        p = _upstream(grad_out, g, exists, weight, NONE, ACC)
        in_p = _second(dot, p, n, ties, target, FORM, NORM)[2]
        tl.store(dots + g, dot, mask=exists)
        if NONE:
            tl.store(in_grad_out + g, in_p, mask=exists)
        acc += tl.where(exists, in_p, 0.0)
    if not NONE:
        tl.store(in_grad_out, tl.sum(acc, 0) * tl.full((), weight, ACC))


@triton.jit
def grad_norm_penalty_double_backward_kernel(
    tangent,
    grad_out,
    grad,
    saved,
    out,
    dots,
    outer,
    reduce,
    inner,
    target: tl.float64,
    weight: tl.float64,
    FORM: tl.constexpr,
    NORM: tl.constexpr,
    NONE: tl.constexpr,
    STRIDED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The derivative in grad, from the dots."""
    g, exists, offset, mask = _map_tile(tl.program_id(0), outer, reduce, inner, STRIDED, BLOCK_G, BLOCK_R)
    x = tl.load(grad + offset, mask=mask, other=0.0).to(ACC)
    u = x
    if NORM == L2:
        u = tl.load(tangent + offset, mask=mask, other=0.0).to(ACC)
    n, ties = _load_saved(saved, g, exists, tl.cast(outer, tl.int64) * inner, NORM)
    dot = tl.load(dots + g, mask=exists, other=0.0)
    p = _upstream(grad_out, g, exists, weight, NONE, ACC)
    along_tangent, along_direction, _ = _second(dot, p, n, ties, target, FORM, NORM)
    tl.store(out + offset, _second_of_tile(x, u, n, along_tangent, along_direction, NORM), mask=mask)
