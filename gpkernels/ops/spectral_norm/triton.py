"""spectral_norm in Triton: three launches an iteration, one to scale, two for the gradient, for any group of up to 64
layers; more layers take further rounds.

What a launch knows of its layers comes two ways. The sizes are a table on the device, made once for all weights of the
same shapes. The addresses, which change from call to call, are arguments of the kernel, a tuple of tensors each: no
copy from the host, and a captured CUDA graph keeps them with its nodes. A tuple is filled up to a power of 2, so that
networks of different depth share compiled kernels. The table is copied from the host: run a group once before it is
captured, as Triton's own compilation wants it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from gpkernels._checks import fail
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._triton import TILE, accumulation, launch
from gpkernels.ops.spectral_norm import _triton_kernels as kernels
from gpkernels.ops.spectral_norm import _triton_scale_kernels as scale_kernels
from gpkernels.ops.spectral_norm.layout import padded, unpack, vectors_size

LAYERS = 64
"""Of a launch."""

_ROWS = 16
"""Rows that a program reads at a time."""

_FINISH = 1024
"""Elements of u or v that a program finishes at a time."""

_PARTS = 8
"""Parts of u that a program adds up at a time."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Plan:
    """The launches of some shapes: numbers of programs, and the device's table of layers, as
    `_triton_kernels.py` reads it, with the layer of each program."""

    programs: int
    finish_programs: int
    scratch: int
    table: Tensor
    layers: Tensor
    finish_layers: Tensor


def _row_tile(rows: int) -> int:
    """Every tile of W t adds up what the tiles of W^T u left: about a fourth, at most, of what it reads of W."""
    return max(2, triton.cdiv(math.isqrt(4 * rows), _ROWS)) * _ROWS


def _block_columns(dtype: torch.dtype) -> int:
    return TILE // 8 if dtype != torch.float64 else TILE // 16


@lru_cache(maxsize=256)
def _plan(shapes: tuple[torch.Size, ...], dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Plan:
    block_c = _block_columns(dtype)
    table: list[list[int]] = []
    layers: list[int] = []
    finish_layers: list[tuple[int, int]] = []
    scratch = place = 0
    for index, (shape, dim) in enumerate(zip(shapes, dims, strict=True)):
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        swapped = inner == 1
        rows, columns, inner = (outer, shape[dim], shape[dim]) if swapped else (shape[dim], outer * inner, inner)
        row_tile = _row_tile(rows)
        table.append([rows, columns, inner, int(swapped), row_tile, len(layers), scratch, place])
        place += sum(map(padded, (shape[dim], math.prod(shape) // shape[dim])))
        tiles = triton.cdiv(rows, row_tile), triton.cdiv(columns, block_c)
        layers += [index] * (tiles[0] * tiles[1])
        t_parts, parts = reversed(tiles) if swapped else tiles
        t_length, length = (rows, columns) if swapped else (columns, rows)
        finish_layers += [(index, i) for i in range(1 + triton.cdiv(t_length, _FINISH))]
        scratch += (t_parts + 1) * t_length + parts + 2 * parts * length
    return _Plan(
        len(layers),
        len(finish_layers),
        scratch,
        torch.tensor(table, dtype=torch.int64, device=device),
        torch.tensor(layers, dtype=torch.int32, device=device),
        torch.tensor(finish_layers, dtype=torch.int32, device=device),
    )


def _check(name: str, tensors: Sequence[Tensor], wanted: Sequence[int], dtype: torch.dtype) -> None:
    if len(tensors) != len(wanted):
        raise fail(name, f"{len(wanted)} tensors", len(tensors))
    for x, numel in zip(tensors, wanted, strict=True):
        if x.numel() != numel or x.dtype != dtype or not x.is_contiguous():
            got = f"{tuple(x.shape)} of {x.dtype}, strides {x.stride()}"
            raise fail(name, f"{numel} contiguous elements of {dtype}", got)


def _check_weights(weights: Sequence[Tensor]) -> None:
    if not weights:
        raise fail("weights", "at least one", "none")
    _check("weights", weights, [w.numel() for w in weights], weights[0].dtype)
    if any(w.numel() == 0 for w in weights):
        raise fail("weights", "no empty one", "one without elements")


def _check_dims(weights: Sequence[Tensor], dims: Sequence[int]) -> None:
    if len(dims) != len(weights):
        raise fail("dims", f"{len(weights)} dimensions", len(dims))


def _check_vectors(weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], dims: Sequence[int]) -> None:
    _check_weights(weights)
    _check_dims(weights, dims)
    dtype, rows = accumulation_dtype(weights[0].dtype), [w.shape[d] for w, d in zip(weights, dims, strict=True)]
    _check("u", u, rows, dtype)
    _check("v", v, [w.numel() // n for w, n in zip(weights, rows, strict=True)], dtype)


def _padded(tensors: Sequence[_T]) -> tuple[_T, ...]:
    """Filled up to a power of 2 with the first."""
    return (*tensors, *(triton.next_power_of_2(len(tensors)) - len(tensors)) * [tensors[0]])


def _chunks(count: int) -> Iterator[slice]:
    return (slice(first, min(count, first + LAYERS)) for first in range(0, count, LAYERS))


def _plan_of(weights: Sequence[Tensor], dims: Sequence[int]) -> _Plan:
    return _plan(tuple(w.shape for w in weights), tuple(dims), weights[0].dtype, weights[0].device)


def _blocks(weight: Tensor) -> dict[str, Any]:
    size = weight.dtype.itemsize
    blocks = {"W": 16 // size, "BLOCK_R": _ROWS, "BLOCK_C": _block_columns(weight.dtype)}
    return {"ACC": accumulation(weight), **blocks, "num_warps": 4 if size == 2 else 8}


def spectral_norm_iterate(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    iterations: int,
    eps: float,
) -> Tensor:
    _check_vectors(weights, u, v, dims)
    return _iterate(weights, u, v, dims, iterations, eps, None)


def spectral_norm_update(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    results: Sequence[Tensor],
    dims: Sequence[int],
    targets: Sequence[float],
    iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check_vectors(weights, u, v, dims)
    _check("results", results, [w.numel() for w in weights], weights[0].dtype)
    _check_targets(weights, targets)
    vectors = u[0].new_empty(vectors_size(weights, dims))
    sigma = _iterate(weights, u, v, dims, iterations, eps, vectors)
    _scale(weights, results, sigma, targets, eps)
    return sigma, vectors


def _iterate(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    iterations: int,
    eps: float,
    vectors: Tensor | None,
) -> Tensor:
    """Moves u and v, also to `vectors`, and returns sigma."""
    sigma, constants = u[0].new_empty(len(weights)), _blocks(weights[0])
    finish = {"ACC": constants["ACC"], "BLOCK_C": constants["BLOCK_C"], "PARTS": _PARTS, "BLOCK": _FINISH}
    finish |= {"COPY": vectors is not None, "num_warps": 8}
    for chunk in _chunks(len(weights)):
        w, left, right = (_padded(x[chunk]) for x in (weights, u, v))
        plan = _plan_of(weights[chunk], dims[chunk])
        memory = u[0].new_empty(plan.scratch)
        copies = memory if vectors is None else vectors[vectors_size(weights[: chunk.start], dims[: chunk.start]) :]
        tiles = (memory, plan.table, plan.layers, w)
        last = (memory, plan.table, plan.finish_layers, left, right, sigma[chunk], copies, eps)

        def product(vectors: tuple[Tensor, ...], by: int, plan: _Plan = plan, tiles: Any = tiles) -> None:
            launch(kernels.spectral_norm_product_kernel, plan.programs, *tiles, vectors, BY=by, **constants)

        if iterations == 0:
            product(right, 1)
            launch(kernels.spectral_norm_finish_kernel, plan.finish_programs, *last, ITERATION=False, **finish)
        for _ in range(iterations):
            product(left, 0)
            product(right, 2)
            launch(kernels.spectral_norm_finish_kernel, plan.finish_programs, *last, ITERATION=True, **finish)
    return sigma


@lru_cache(maxsize=256)
def _targets(targets: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(targets, dtype=torch.float64, device=device)


def _check_scale(weights: Sequence[Tensor], sigma: Tensor, targets: Sequence[float]) -> None:
    _check("sigma", [sigma], [len(weights)], accumulation_dtype(weights[0].dtype))
    _check_targets(weights, targets)


def _check_targets(weights: Sequence[Tensor], targets: Sequence[float]) -> None:
    if len(targets) != len(weights):
        raise fail("targets", f"{len(weights)} numbers", len(targets))


def spectral_norm_scale(weights: Sequence[Tensor], sigma: Tensor, targets: Sequence[float], eps: float) -> list[Tensor]:
    if not weights:
        return []
    _check_weights(weights)
    _check_scale(weights, sigma, targets)
    results = [torch.empty_like(w) for w in weights]
    _scale(weights, results, sigma, targets, eps)
    return results


def _scale(
    weights: Sequence[Tensor], results: Sequence[Tensor], sigma: Tensor, targets: Sequence[float], eps: float
) -> None:
    for chunk in _chunks(len(weights)):
        plan = _plan_of(weights[chunk], [0] * len(weights[chunk]))  # whichever dimension the rows are
        factors = _targets(tuple(targets[chunk]), sigma.device)
        arguments = (sigma[chunk], plan.table, plan.layers, factors, _padded(weights[chunk]), _padded(results[chunk]))
        launch(scale_kernels.spectral_norm_scale_kernel, plan.programs, *arguments, eps, **_blocks(weights[0]))


def spectral_norm_scale_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    vectors: Tensor,
    sigma: Tensor,
    dims: Sequence[int],
    targets: Sequence[float],
    eps: float,
) -> list[Tensor]:
    _check_weights(weights)
    _check_dims(weights, dims)
    _check("vectors", [vectors], [vectors_size(weights, dims)], accumulation_dtype(weights[0].dtype))
    u, v = unpack(vectors, weights, dims)
    _check("grads", grads, [w.numel() for w in weights], weights[0].dtype)
    _check_scale(weights, sigma, targets)
    results, constants = [torch.empty_like(w) for w in weights], _blocks(weights[0])
    for chunk in _chunks(len(weights)):
        plan = _plan_of(weights[chunk], dims[chunk])
        g, w, out, left, right = (_padded(x[chunk]) for x in (grads, weights, results, u, v))
        memory, factors = sigma.new_empty(plan.programs), _targets(tuple(targets[chunk]), sigma.device)
        tables = (memory, plan.table, plan.layers)
        launch(scale_kernels.spectral_norm_dot_kernel, plan.programs, *tables, g, w, **constants)
        arguments = (*tables, factors, sigma[chunk], g, out, left, right, eps)
        launch(scale_kernels.spectral_norm_grad_kernel, plan.programs, *arguments, **constants, BLOCK=TILE // 2)
    return results
