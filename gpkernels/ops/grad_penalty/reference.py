"""grad_norm_penalty in plain, differentiable torch: the specification, the backend for devices without a kernel,
and the road to gradients beyond the second order.

Notation: n the norm of a group of elements, s = dn/dg its direction, p the gradient of the reduced value in
phi(n), G the tangent of g, d = <G, s>.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype, layout_of
from gpkernels.ops.grad_penalty import penalties

NORMS = ("l2", "l1", "linf")
AXES = ("sample", "pixel", "batch")
REDUCTIONS = ("mean", "sum", "none")
"""Names of the options; a raw op takes positions."""

_L2, _L1, _LINF = range(3)
_SAMPLE, _PIXEL, _BATCH = range(3)
_MEAN, _SUM, _NONE = range(3)


def _grouped(x: Tensor, axes: int) -> Tensor:
    """A view or copy, in the accumulation dtype, in which dimension 1 runs over the elements of a group."""
    x = x.to(accumulation_dtype(x.dtype))
    if axes == _SAMPLE:
        return x.reshape(x.shape[0], -1)
    return x if axes == _PIXEL else x.reshape(1, -1)


def _ungrouped(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape).to(like.dtype).contiguous(memory_format=layout_of(like))


def _norms(g: Tensor, norm: int) -> Tensor:
    """The norms over dimension 1; differentiable to any order, with derivative 0 at 0."""
    if norm == _L1:
        return g.abs().sum(1)
    if norm == _LINF:
        return g.abs().amax(1)
    square = g.square().sum(1)
    nonzero = square != 0
    return torch.where(nonzero, torch.where(nonzero, square, 1.0).sqrt(), 0.0)


def _direction(g: Tensor, n: Tensor, norm: int) -> Tensor:
    """s = dn/dg. For linf the elements that attain the norm share it equally."""
    if norm == _L1:
        return g.sign()
    n = n.unsqueeze(1)
    if norm == _LINF:
        attains = g.abs() == n
        return g.sign() * attains / attains.sum(1, keepdim=True)
    return torch.where(n != 0, g / torch.where(n != 0, n, 1.0), 0.0)


def _upstream(grad_out: Tensor, n: Tensor, reduction: int) -> Tensor:
    """p, one a group."""
    return (grad_out / n.numel() if reduction == _MEAN else grad_out).expand(n.shape)


def _reduce(values: Tensor, reduction: int) -> Tensor:
    if reduction == _NONE:
        return values
    return values.mean() if reduction == _MEAN else values.sum()


def grad_norm_penalty(
    grad: Tensor, form: int, target: float, norm: int, axes: int, reduction: int
) -> tuple[Tensor, Tensor]:
    """(the reduced penalty, what its derivatives need), in the accumulation dtype.

    The second result has shape (1, *groups), the norm of each group, or for linf (2, *groups): the norm, and how many
    elements attain it.
    """
    row = penalties.row_of(form)
    g = _grouped(grad, axes)
    n = _norms(g, norm)
    saved = n.unsqueeze(0)
    if norm == _LINF:
        saved = torch.stack((n, (g.abs() == n.unsqueeze(1)).sum(1).to(n.dtype)))
    is_square = row.name == "squared" or (target == 0 and row.name in ("two_sided", "one_sided"))
    if is_square and norm == _L2:  # without the root, so that the second derivative is right at 0 too
        return _reduce(g.square().sum(1), reduction), saved
    return _reduce(row.phi(n, target), reduction).clone(), saved


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
    """p phi'(n) s."""
    row = penalties.row_of(form)
    g, n = _grouped(grad, axes), saved[0]
    p = _upstream(grad_out, n, reduction)
    if norm == _L2:
        result = (p * penalties.d_over_n(row, n, target)).unsqueeze(1) * g
    else:
        result = (p * row.d(n, target)).unsqueeze(1) * _direction(g, n, norm)
    return _ungrouped(result, grad)


def grad_norm_penalty_double_backward(
    grad_grad: Tensor,
    grad_out: Tensor,
    grad: Tensor,
    saved: Tensor | None,
    form: int,
    target: float,
    norm: int,
    axes: int,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """Derivative of the backward along its result's gradient G: in grad, p [phi''(n) d s + (l2 only)
    phi'(n)/n (G - d s)]; in grad_out, the reduced phi'(n) d. Without `saved` the norms are computed from `grad`, and
    the result is then differentiable in every tensor."""
    row = penalties.row_of(form)
    g, tangent = _grouped(grad, axes), _grouped(grad_grad, axes)
    n = _norms(g, norm) if saved is None else saved[0]
    p = _upstream(grad_out, n, reduction)
    s = _direction(g, n, norm)
    d = (tangent * s).sum(1)
    curved = row.d2(n, target)
    if norm == _L2:
        ratio = penalties.d_over_n(row, n, target)
        result = (p * ratio).unsqueeze(1) * tangent + (p * (curved - ratio) * d).unsqueeze(1) * s
        in_grad_out = ratio * (tangent * g).sum(1)  # phi'(n) d, but with the right derivative at g = 0 too
    else:
        result = (p * curved * d).unsqueeze(1) * s
        in_grad_out = row.d(n, target) * d
    return _ungrouped(result, grad), _reduce(in_grad_out, reduction).reshape(grad_out.shape)
