"""grad_norm_penalty: phi(||g||) over groups of a gradient, reduced. grad_norm is its row "linear", not reduced."""

import torch

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._library import define
from gpkernels.ops._rows import register_backends
from gpkernels.ops.grad_penalty import penalties, reference

_OPTIONS = "int form, float target, int norm, int axes, int reduction"


def _fake(grad, form, target, norm, axes, reduction):
    spatial = grad.shape[2:] if reference.AXES[axes] == "pixel" else ()
    shape = (1,) if reference.AXES[axes] == "batch" else (grad.shape[0], *spatial)
    dtype = accumulation_dtype(grad.dtype)
    rows = 2 if reference.NORMS[norm] == "linf" else 1
    value_shape = shape if reference.REDUCTIONS[reduction] == "none" else ()
    return grad.new_empty(value_shape, dtype=dtype), grad.new_empty((rows, *shape), dtype=dtype)


def _fake_backward(grad_out, grad, saved, form, target, norm, axes, reduction):
    return torch.empty_like(grad)


def _fake_double_backward(grad_grad, grad_out, grad, saved, form, target, norm, axes, reduction):
    return torch.empty_like(grad), torch.empty_like(grad_out)


define(
    f"grad_norm_penalty(Tensor grad, {_OPTIONS}) -> (Tensor, Tensor)",
    reference.grad_norm_penalty,
    _fake,
)
define(
    f"grad_norm_penalty_backward(Tensor grad_out, Tensor grad, Tensor saved, {_OPTIONS}) -> Tensor",
    reference.grad_norm_penalty_backward,
    _fake_backward,
)
define(
    "grad_norm_penalty_double_backward(Tensor grad_grad, Tensor grad_out, Tensor grad, Tensor saved,"
    f" {_OPTIONS}) -> (Tensor, Tensor)",
    reference.grad_norm_penalty_double_backward,
    _fake_double_backward,
)


def _missing_row(form: int = 0) -> str:
    if form >= penalties.NATIVE_COUNT:
        return f"the kernels have no row for the penalty {penalties.row_of(form).name!r}"
    return ""


register_backends(
    "grad_norm_penalty",
    reference,
    ("grad_norm_penalty", "grad_norm_penalty_backward", "grad_norm_penalty_double_backward"),
    _missing_row,
)
