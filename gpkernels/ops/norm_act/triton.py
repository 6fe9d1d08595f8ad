"""norm_act in Triton.

Where a tile holds whole groups: one launch that reads every input once. Otherwise one that sums the groups, long
groups by several programs, and one that adds up what these left and writes the results. The gradients in weight and
bias come with them; where several programs share a channel, a last launch adds up theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from gpkernels._checks import fail
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._triton import PROGRAMS, TILE, accumulation, block, launch
from gpkernels.ops.norm_act import _triton_kernels as kernels

_WARP = 1024
"""Bytes of a tile, in the accumulation dtype, for each warp: 8 registers a thread for each number of an element, of
which the second derivative keeps up to nine."""

_LARGEST = 16384
"""Bytes, in the accumulation dtype, of the largest group that a tile holds whole."""

_RUN = 64
"""Bytes that a tile reads side by side where memory allows it."""

_SUMMED = 8
"""Elements of a channel that a program sums before it stores the sum, at least."""


@dataclass(frozen=True)
class _Tiling:
    """Sizes of the tensor, of a tile (as `_triton_kernels.py` has them), and of a program's share."""

    batch: int
    pixels: int
    per_group: int
    groups: int
    of_batch: bool
    last: bool
    whole: bool
    block_n: int
    several: int
    part: int
    block_s: int
    affine: bool

    @cached_property
    def elements(self) -> int:
        """Elements of a tile."""
        return self.block_n * self.several * self.part * self.block_s

    @cached_property
    def n_blocks(self) -> int:
        return triton.cdiv(self.batch, self.block_n)

    @cached_property
    def g_blocks(self) -> int:
        return triton.cdiv(self.groups, self.several)

    @cached_property
    def c_blocks(self) -> int:
        return self.g_blocks * triton.cdiv(self.per_group, self.part)

    @cached_property
    def s_blocks(self) -> int:
        return triton.cdiv(self.pixels, self.block_s)

    @cached_property
    def tiles(self) -> int:
        return self.n_blocks * self.c_blocks * self.s_blocks

    @cached_property
    def group_tiles(self) -> int:
        """Tiles, at most, of which no two share a group."""
        return self.g_blocks * (1 if self.of_batch else self.n_blocks)

    @cached_property
    def chunk(self) -> int:
        """Tiles of a group that one program sums. Few programs share a group, so that to add up what they leave takes
        about a fifth of what it takes to write the results, at most."""
        of_group = self.tiles // self.group_tiles
        adding_up_once = of_group if self.of_batch else self.s_blocks
        most = self.elements // (4 * self.several)
        splits = min(of_group, PROGRAMS // self.group_tiles, max(most, math.isqrt(most * adding_up_once)))
        return triton.cdiv(of_group, max(1, splits))

    @cached_property
    def splits(self) -> int:
        return triton.cdiv(self.tiles // self.group_tiles, self.chunk)

    @cached_property
    def steps(self) -> tuple[int, int]:
        """Tiles, along the batch and the pixels, of which one program writes the results."""
        steps = max(1, self.tiles // PROGRAMS, self.chunk if self.splits > 1 else 1)
        if self.affine and not self.of_batch:
            steps = max(steps, triton.cdiv(_SUMMED, self.block_n * self.block_s))
        s_steps = min(self.s_blocks, steps)
        return min(self.n_blocks, triton.cdiv(steps, s_steps)), s_steps

    @cached_property
    def rows(self) -> int:
        """Programs that write results of the same channels."""
        n_steps, s_steps = self.steps
        return triton.cdiv(self.n_blocks, n_steps) * triton.cdiv(self.s_blocks, s_steps)

    @cached_property
    def block_split(self) -> int:
        return min(triton.next_power_of_2(self.splits), TILE // 2 // self.several)

    @cached_property
    def affine_blocks(self) -> tuple[int, int]:
        """Rows and channels of a tile that adds up rows."""
        block_r = min(TILE // 8, triton.next_power_of_2(self.rows))
        return block_r, min(TILE // block_r, triton.next_power_of_2(self.per_group * self.groups))

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {
            "BATCH": self.of_batch,
            "LAST": self.last,
            "PER_GROUP": self.per_group,
            "PART": self.part,
            "GROUPS": self.several,
            "BLOCK_N": self.block_n,
            "BLOCK_S": self.block_s,
        }


@lru_cache(maxsize=1024)
def _tiling(shape: torch.Size, contiguous: bool, dtype: torch.dtype, groups: int, affine: bool) -> _Tiling:
    """The tiling of a tensor that is not empty."""
    batch, channels, pixels = shape[0], shape[1], shape[2:].numel()
    of_batch, groups = groups == 0, groups or channels
    per_group = channels // groups
    last, run = pixels == 1 or not contiguous, _RUN // dtype.itemsize
    n, g, c, s = (triton.next_power_of_2(size) for size in (batch, groups, per_group, pixels))
    several = min(g, max(1, run // (c if last else s * c)))
    group = s * (n if of_batch else c)
    whole = several * group <= _LARGEST // accumulation_dtype(dtype).itemsize
    if whole:
        block_n, part, block_s = n if of_batch else 1, c, s
        several = min(g, max(several, TILE // 2 // group))
        if not of_batch:
            block_n = min(n, max(1, TILE // 2 // (several * group)))
    else:
        across = TILE // several
        if last:
            part = block(per_group, max(4 * run, across // s))
            block_s = block(pixels, across // part)
        else:
            block_s = block(pixels, across)
            part = block(per_group, across // block_s)
        block_n = min(n, across // (part * block_s)) if of_batch else 1
    tile = block_n, several, part, block_s
    return _Tiling(batch, pixels, per_group, groups, of_batch, last, whole, *tile, affine)


def _check_vector(name: str, v: Tensor, length: int, dtype: torch.dtype) -> None:
    if v.dtype != dtype or v.numel() != length or not v.is_contiguous():
        raise fail(
            name, f"{length} contiguous elements of {dtype}", f"{tuple(v.shape)} of {v.dtype}, strides {v.stride()}"
        )


def _fill(
    results: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    tangent: Tensor | None,
    grad_out: Tensor,
    x: Tensor,
    z: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    slope: float,
) -> None:
    """Fills the gradients in x, grad_out, weight and bias; None is one that is not wanted."""
    out, out_tangent, in_weight, in_bias = results
    dtype = accumulation_dtype(x.dtype)
    for name, v in (("mean", mean), ("rstd", rstd)):
        _check_vector(name, v, x.shape[0] * groups if groups else x.shape[1], dtype)
    if weight is not None:
        _check_vector("weight", weight, x.shape[1], dtype)
    if x.numel() == 0:
        for gradient in (in_weight, in_bias):
            if gradient is not None:
                gradient.zero_()
        return
    t = _tiling(x.shape, x.is_contiguous(), x.dtype, groups, in_weight is not None)
    add_up = in_weight is not None and not t.of_batch and t.rows > 1
    weight_rows, bias_rows = (
        v if v is None or not add_up else v.new_empty((t.rows, *v.shape)) for v in (in_weight, in_bias)
    )
    inputs, outputs = (x, grad_out, z, mean, rstd, weight, tangent), (out, out_tangent, weight_rows, bias_rows)
    size, (n_steps, s_steps) = (t.batch, t.pixels, t.groups), t.steps
    numbers = 1.0 / (t.pixels * (t.batch if t.of_batch else t.per_group)), slope
    programs, acc = t.c_blocks * t.rows, accumulation(x)
    constants = t.constants | {"ACC": acc, "num_warps": min(16, max(4, t.elements * dtype.itemsize // _WARP))}
    if t.whole:
        launch(kernels.norm_act_whole_kernel, programs, *inputs, *outputs, *size, n_steps, *numbers, **constants)
    else:
        partial = mean.new_empty((2 if tangent is None else 5) * mean.numel() * t.splits)
        sums = (*inputs, partial, *size, t.chunk, t.splits, slope)
        launch(kernels.norm_act_sums_kernel, t.group_tiles * t.splits, *sums, **constants)
        arguments = (*inputs, partial, *outputs, *size, n_steps, s_steps, t.splits, *numbers)
        launch(kernels.norm_act_apply_kernel, programs, *arguments, **constants, BLOCK_SPLIT=t.block_split)
    if add_up:
        channels, (block_r, block_c) = x.shape[1], t.affine_blocks
        affine = (weight_rows, bias_rows, in_weight, in_bias)
        blocks = {"ACC": acc, "BLOCK_R": block_r, "BLOCK_C": block_c}
        launch(kernels.norm_act_affine_kernel, -(-channels // block_c), *affine, t.rows, channels, **blocks)


def norm_act_backward(
    grad_out: Tensor,
    x: Tensor,
    z: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    slope: float,
    need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1] if need_affine else 0
    grad_x, in_weight, in_bias = torch.empty_like(x), mean.new_empty(channels), mean.new_empty(channels)
    wanted = (in_weight, in_bias) if need_affine else (None, None)
    _fill((grad_x, None, *wanted), None, grad_out, x, z, mean, rstd, weight, groups, slope)
    return grad_x, in_weight, in_bias


def norm_act_double_backward(
    tangent: Tensor,
    grad_out: Tensor,
    x: Tensor,
    z: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    out_tangent, in_x, in_weight = torch.empty_like(x), torch.empty_like(x), mean.new_empty(x.shape[1])
    _fill((in_x, out_tangent, in_weight, None), tangent, grad_out, x, z, mean, rstd, weight, groups, slope)
    return out_tangent, in_x, in_weight
