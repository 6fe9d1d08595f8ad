"""grad_norm_penalty in Triton.

Forward: a launch that reduces the groups, and one that combines what its programs left. Backward: one launch. Double
backward: a launch for the dots <tangent, direction>, which also writes the result where a group fits in a tile; one
that combines; and one that writes the result otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._triton import TILE, Tiling, accumulation, launch, tiling, weighted_sum
from gpkernels.ops.grad_penalty import _triton_kernels as kernels
from gpkernels.ops.grad_penalty import penalties, reference


def _groups_shape(grad: Tensor, axes: int) -> tuple[int, ...]:
    name = reference.AXES[axes]
    return (1,) if name == "batch" else (grad.shape[0], *(grad.shape[2:] if name == "pixel" else ()))


def _groups(grad: Tensor, axes: int) -> Tiling:
    """How the groups lie in memory."""
    name, batch = reference.AXES[axes], grad.shape[0]
    if name == "batch":
        return tiling(1, grad.numel())
    if name == "sample":
        return tiling(batch, grad.numel() // batch)
    channels, pixels = grad.shape[1], grad.shape[2:].numel()
    return tiling(batch, channels, pixels) if grad.is_contiguous() else tiling(batch * pixels, channels)


def _combining(t: Tiling) -> dict[str, int]:
    """Blocks of the one program that combines the splits."""
    block_s = triton.next_power_of_2(t.splits)
    block_g = min(triton.next_power_of_2(t.groups), max(1, TILE // 2 // block_s), TILE // 8)
    return {"BLOCK_G": block_g, "BLOCK_S": block_s}


def _weight(t: Tiling, reduction: int) -> float:
    """The weight of one group in the reduced value."""
    return 1.0 / t.groups if reference.REDUCTIONS[reduction] == "mean" else 1.0


def _constants(t: Tiling, form: int, norm: int, reduction: int, like: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constants of every kernel, and those of the kernels that work on tiles."""
    every = {"FORM": form, "NORM": norm, "NONE": reference.REDUCTIONS[reduction] == "none", "ACC": accumulation(like)}
    return every, every | {"STRIDED": t.strided, "BLOCK_G": t.block_g, "BLOCK_R": t.block_r}


def grad_norm_penalty(
    grad: Tensor, form: int, target: float, norm: int, axes: int, reduction: int
) -> tuple[Tensor, Tensor]:
    shape = _groups_shape(grad, axes)
    rows = 2 if reference.NORMS[norm] == "linf" else 1
    dtype = accumulation_dtype(grad.dtype)
    if grad.numel() == 0:
        saved = grad.new_zeros((rows, *shape), dtype=dtype)
        values = penalties.row_of(form).phi(saved[0], target)
        if reference.REDUCTIONS[reduction] == "none":
            return values.clone(), saved
        return values.sum() if reference.REDUCTIONS[reduction] == "sum" else values.mean(), saved
    t = _groups(grad, axes)
    every, tile = _constants(t, form, norm, reduction, grad)
    none, split, weight = every["NONE"], t.splits > 1, _weight(t, reduction)
    saved = grad.new_empty((rows, *shape), dtype=dtype)
    value = grad.new_empty(shape if none else (), dtype=dtype)
    partial = grad.new_empty(rows * t.groups * t.splits if split else t.group_tiles, dtype=dtype)
    size = (t.outer, t.reduce, t.inner, t.chunk)
    programs = t.group_tiles * t.splits
    launch(kernels.grad_norm_penalty_kernel, programs, grad, saved, value, partial, *size, target, SPLIT=split, **tile)
    if split:
        combining = every | _combining(t)
        combine = kernels.grad_norm_penalty_combine_kernel
        launch(combine, 1, partial, saved, value, t.groups, t.splits, target, weight, **combining)
    elif not none:
        weighted_sum(partial, value, weight)
    return value, saved


def grad_norm_penalty_backward(
    grad_out: Tensor,
    grad: Tensor,
    saved: Tensor,
    form: int,
    target: float,
    norm: int,
    axes: int,
    reduction: int,
) -> Tensor:
    out = torch.empty_like(grad)
    if grad.numel() == 0:
        return out
    t = _groups(grad, axes)
    _, tile = _constants(t, form, norm, reduction, grad)
    size = (t.outer, t.reduce, t.inner)
    kernel = kernels.grad_norm_penalty_backward_kernel
    launch(kernel, t.tiles, grad_out, grad, saved, out, *size, target, _weight(t, reduction), **tile)
    return out


def grad_norm_penalty_double_backward(
    grad_grad: Tensor,
    grad_out: Tensor,
    grad: Tensor,
    saved: Tensor,
    form: int,
    target: float,
    norm: int,
    axes: int,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    out, in_grad_out = torch.empty_like(grad), torch.empty_like(grad_out)
    if grad.numel() == 0:
        return out, in_grad_out.zero_()
    t = _groups(grad, axes)
    every, tile = _constants(t, form, norm, reduction, grad)
    split, whole, weight = t.splits > 1, t.reduce <= t.block_r, _weight(t, reduction)
    dots = saved.new_empty(0 if whole else t.groups)
    partial = saved.new_empty(t.groups * t.splits if split else t.group_tiles)
    inputs, size, numbers = (grad_grad, grad_out, grad, saved), (t.outer, t.reduce, t.inner), (target, weight)
    results = (out, in_grad_out, dots, partial)
    programs = t.group_tiles * t.splits
    flags = {"SPLIT": split, "WHOLE": whole}
    launch(kernels.grad_norm_penalty_dot_kernel, programs, *inputs, *results, *size, t.chunk, *numbers, **flags, **tile)
    if split:
        combining = every | _combining(t)
        kernel = kernels.grad_norm_penalty_combine_dots_kernel
        launch(kernel, 1, partial, grad_out, saved, in_grad_out, dots, t.groups, t.splits, *numbers, **combining)
    elif not every["NONE"]:
        weighted_sum(partial, in_grad_out, weight)
    if not whole:
        kernel = kernels.grad_norm_penalty_double_backward_kernel
        launch(kernel, t.tiles, *inputs, out, dots, *size, *numbers, **tile)
    return out, in_grad_out
