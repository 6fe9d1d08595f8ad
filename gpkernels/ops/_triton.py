"""What the Triton kernels share: the random numbers of `csrc/philox.h` and the tiling of groups."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Elements a program holds at a time: with 4 warps, 16 a thread."""

PROGRAMS = 1024
"""Long groups are split until a launch has about this many programs. A constant, so that results do not depend on
the device."""


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Runs `programs` instances of a kernel on the device of its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **constants)


def accumulation(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


class Tiling(NamedTuple):
    """How programs share out groups of elements.

    Element (o, r, i) lies at (o * reduce + r) * inner + i and belongs to group o * inner + i. A tile is `block_g`
    groups by `block_r` of their elements; a program of a reduction walks `chunk` elements of each group of its tile.
    """

    outer: int
    reduce: int
    inner: int
    block_g: int
    block_r: int
    chunk: int

    @property
    def groups(self) -> int:
        return self.outer * self.inner

    @property
    def strided(self) -> bool:
        return self.inner > 1

    @property
    def group_tiles(self) -> int:
        if self.strided:
            return self.outer * triton.cdiv(self.inner, self.block_g)
        return triton.cdiv(self.outer, self.block_g)

    @property
    def splits(self) -> int:
        return triton.cdiv(self.reduce, self.chunk)

    @property
    def tiles(self) -> int:
        return self.group_tiles * triton.cdiv(self.reduce, self.block_r)


def block(n: int, largest: int) -> int:
    """The power of 2 up to `largest` in blocks of which n elements waste the fewest lanes; no less than a quarter of
    it where n is not."""
    sizes = [size for size in (largest, largest // 2, largest // 4) if 0 < size < 2 * n]
    return min(sizes, key=lambda size: triton.cdiv(n, size) * size, default=triton.next_power_of_2(n))


def tiling(outer: int, reduce: int, inner: int = 1) -> Tiling:
    """The tiling of a tensor that is not empty.

    What is done once a group (eps, norms, their divisions) takes most registers where a thread has many groups: tiles
    of many groups are smaller, and smaller still where rows do not allow vector accesses.
    """
    if inner > 1:
        widest = max(64, TILE // min(TILE, triton.next_power_of_2(reduce)))
        block_g = min(triton.next_power_of_2(inner), widest, TILE // 8)
        block_r = min(triton.next_power_of_2(reduce), TILE // 2 // block_g)
    else:
        block_r = block(reduce, TILE)
        several = TILE // 4 if reduce % 16 else TILE // 2
        block_g = min(triton.next_power_of_2(outer), max(1, several // block_r))
    whole = Tiling(outer, reduce, inner, block_g, block_r, reduce)
    blocks = triton.cdiv(reduce, block_r)
    splits = max(1, min(blocks, PROGRAMS // whole.group_tiles))
    return whole._replace(chunk=triton.cdiv(blocks, splits) * block_r)


@triton.jit
def group_tile(tile, outer, reduce, inner, STRIDED: tl.constexpr, BLOCK_G: tl.constexpr):
    """The groups of a tile, the offset of the first element of each, and which of them exist."""
    lane = tl.arange(0, BLOCK_G)
    if STRIDED:
        per_outer = tl.cdiv(inner, BLOCK_G)
        o = (tile // per_outer).to(tl.int64)
        i = (tile % per_outer).to(tl.int64) * BLOCK_G + lane
        g, base, exists = o * inner + i, o * reduce * inner + i, i < inner
    else:
        g = tile.to(tl.int64) * BLOCK_G + lane
        base, exists = g * reduce, g < outer
    return g, base, exists


@triton.jit
def philox(seed, block):
    """The four words of Philox blocks (int64)."""
    key, stream = tl.load(seed), tl.load(seed + 1)
    lo, hi = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    return tl.philox(key, lo, hi, stream.to(tl.uint32), (stream >> 32).to(tl.uint32))


@triton.jit
def in_order(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], ...: number 4 b + w of a stream comes from word w of block b."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def to_uniform(word):
    """U[0, 1) on a grid of 2^-24."""
    return (word >> 8).to(tl.int32, bitcast=True).to(tl.float32) * (1.0 / 16777216)


@triton.jit
def uniform_at(seed, i):
    """Numbers i of the stream."""
    a, b, c, d = philox(seed, i // 4)
    w = i % 4
    return to_uniform(tl.where(w < 2, tl.where(w == 0, a, b), tl.where(w == 2, c, d)))


@triton.jit
def uniform_block(seed, first, BLOCK: tl.constexpr):
    """Numbers first, ..., first + BLOCK - 1 of the stream; both are multiples of 4."""
    a, b, c, d = philox(seed, first // 4 + tl.arange(0, BLOCK // 4))
    return to_uniform(in_order(a, b, c, d))


@triton.jit
def log_unit(u):
    """ln(u) for u in (0, 1], as in csrc/philox.h."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    m = (bits - exponent * 8388608).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    series = 1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7 + s2 * (1.0 / 9))))
    return exponent.to(tl.float32) * 0.693147181 + 2.0 * s * series


@triton.jit
def cos_sin_turn(u):
    """(cos, sin) of 2 pi u for u in [0, 1), as in csrc/philox.h: no range reduction, so no local memory."""
    quarter = (4.0 * u + 0.5).to(tl.int32)
    t = 6.28318531 * (u - 0.25 * quarter.to(tl.float32))
    t2 = t * t
    c = 1.0 + t2 * (-1.0 / 2 + t2 * (1.0 / 24 + t2 * (-1.0 / 720 + t2 * (1.0 / 40320 - t2 * (1.0 / 3628800)))))
    s = t * (1.0 + t2 * (-1.0 / 6 + t2 * (1.0 / 120 + t2 * (-1.0 / 5040 + t2 * (1.0 / 362880)))))
    swap = (quarter & 1) != 0
    x, y = tl.where(swap, s, c), tl.where(swap, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -x, x), tl.where((quarter & 2) != 0, -y, y)


@triton.jit
def normal_pair(word0, word1):
    """Box-Muller: two words give two independent N(0, 1)."""
    radius = root(-2.0 * log_unit(to_uniform(word0) + (1.0 / 16777216)))
    cosine, sine = cos_sin_turn(to_uniform(word1))
    return radius * cosine, radius * sine


@triton.jit
def noise_block(seed, first, NOISE: tl.constexpr, BLOCK: tl.constexpr):
    """As `uniform_block`, but N(0, 1) for NOISE 0 and U[-1, 1) for NOISE 1."""
    if NOISE == 0:
        a, b, c, d = philox(seed, first // 4 + tl.arange(0, BLOCK // 4))
        n0, n1 = normal_pair(a, b)
        n2, n3 = normal_pair(c, d)
        numbers = in_order(n0, n1, n2, n3)
    else:
        numbers = 2.0 * uniform_block(seed, first, BLOCK) - 1.0
    return numbers


L2, L1, LINF = (tl.constexpr(code) for code in range(3))
"""The norms, as `gpkernels.ops.grad_penalty.reference.NORMS` numbers them."""


@triton.jit
def phi(n, target, FORM: tl.constexpr):
    """phi, phi', phi'': the rows of csrc/penalty_math.h, in their order."""
    k = tl.full((), target, n.dtype)
    d = n - k
    zero, one = tl.zeros_like(n), tl.full(n.shape, 1, n.dtype)
    if FORM == 0:
        value, first, second = d * d, 2 * d, 2 * one
    elif FORM == 1:
        value, first, second = tl.where(d < 0, 0.0, d * d), tl.where(d < 0, 0.0, 2 * d), tl.where(d < 0, zero, 2 * one)
    elif FORM == 2:
        value, first, second = tl.where(d < 0, 0.0, d), tl.where(d <= 0, zero, one), zero
    elif FORM == 3:
        value, first, second = tl.where(d < 0, k, n), tl.where(d <= 0, zero, one), zero
    elif FORM == 4:
        value, first, second = n, one, zero
    else:
        value, first, second = n * n, 2 * n, 2 * one
    return value, first, second


@triton.jit
def divide(a, b):
    """a / b rounded to nearest: the operator alone is less exact in float32."""
    return tl.div_rn(a, b) if b.dtype == tl.float32 else a / b


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def first_over_n(first, second, n):
    """phi'(n) / n; at n = 0 the limit where phi'(0) = 0, else 0."""
    at_zero = tl.where(first == 0, second, 0.0)
    return tl.where(n == 0, at_zero, divide(first, tl.where(n == 0, 1.0, n)))


@triton.jit
def direction(x, n, NORM: tl.constexpr):
    """The direction of the norm at x, times n for l2 and times the number of ties for linf."""
    if NORM == L2:
        s = x
    else:
        s = (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
        if NORM == LINF:
            s = tl.where(tl.abs(x) == n, s, 0.0)
    return s


@triton.jit
def order_of(x):
    """|x| as an integer of the same order, in which NaN exceeds everything: a maximum of these keeps it."""
    return tl.abs(x).to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)


@triton.jit
def sum_kernel(partial, out, count, weight: tl.float64, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """out = weight * the sum of `partial`, in one program."""
    lane = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), ACC)
    for first in range(0, count, BLOCK):
        i = first + lane
        acc += tl.load(partial + i, mask=i < count, other=0.0)
    tl.store(out, tl.sum(acc, 0) * tl.full((), weight, ACC))


def weighted_sum(partial: Tensor, out: Tensor, weight: float) -> None:
    block = min(TILE, triton.next_power_of_2(partial.numel()))
    launch(sum_kernel, 1, partial, out, partial.numel(), weight, ACC=accumulation(out), BLOCK=block)
