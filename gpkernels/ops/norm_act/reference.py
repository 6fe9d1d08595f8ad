"""norm_act in plain, differentiable torch: the specification, the backend for devices without a kernel, and the road
to gradients beyond the second order.

x has shape (N, C, *spatial). With `groups` 0 the statistics are one a channel, over the batch and the pixels
(BatchNorm); with G > 0 one for each sample and each of G blocks of channels (GroupNorm; InstanceNorm for G = C;
LayerNorm for G = 1, over the trailing dimensions taken as channels). The affine map is one weight and one bias a
channel in every case.

Notation, as in the kernels: xh the normalised input, r = 1 / std, m(.) the mean over a group, gamma the weight, g the
gradient of the result, a0 = act' g, a = gamma a0, b the tangent (the gradient of the gradient in x),
k_a = m(xh a), k_b = m(xh b), Q = m(a b) - m(a) m(b) - k_a k_b.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype, layout_of


def _split(x: Tensor, groups: int) -> Tensor:
    """A view of x, in the accumulation dtype, of shape (N, G, C / G, S); G is C for the statistics of a batch."""
    groups = groups or x.shape[1]
    shape = (x.shape[0], groups, x.shape[1] // groups, math.prod(x.shape[2:]))
    return x.to(accumulation_dtype(x.dtype)).reshape(shape)


def _mean(x: Tensor, groups: int) -> Tensor:
    """m(x) of a split x, of a shape that broadcasts against it."""
    return x.mean((2, 3), keepdim=True) if groups else x.mean((0, 2, 3), keepdim=True)


def _statistic(value: Tensor, groups: int, x: Tensor) -> Tensor:
    """A saved mean or rstd, of shape (C,) or (N, G), as a tensor that broadcasts against a split x."""
    return value.reshape(x.shape[0], groups, 1, 1) if groups else value.reshape(1, -1, 1, 1)


def _channels(value: Tensor | None, groups: int, x: Tensor) -> Tensor | float:
    """A weight or bias of shape (C,) as a tensor that broadcasts against a split x; None is a weight of 1."""
    if value is None:
        return 1.0
    groups = groups or x.shape[1]
    return value.to(accumulation_dtype(x.dtype)).reshape(1, groups, x.shape[1] // groups, 1)


def _channel_sum(x: Tensor) -> Tensor:
    """The sum of a split x over everything but the channel, of shape (C,)."""
    return x.sum((0, 3)).reshape(-1)


def _joined(split: Tensor, like: Tensor) -> Tensor:
    return split.reshape(like.shape).to(like.dtype).contiguous(memory_format=layout_of(like))


def _slopes(z: Tensor | None, groups: int, slope: float, x: Tensor) -> Tensor | float:
    """act', from the sign of the activation's result."""
    if z is None:
        return 1.0
    ones = torch.ones((), dtype=accumulation_dtype(x.dtype), device=x.device)
    return torch.where(_split(z.detach(), groups) > 0, ones, slope * ones)


def statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd), of shape (C,) for groups = 0, else (N, G); in the accumulation dtype, differentiable in x."""
    split = _split(x, groups)
    mean = _mean(split, groups)
    rstd = (_mean((split - mean).square(), groups) + eps).rsqrt()
    shape = (x.shape[0], groups) if groups else (x.shape[1],)
    return mean.reshape(shape), rstd.reshape(shape)


def norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, slope: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(act(gamma xh + bias), mean, rstd), where act(y) is y for y > 0, else slope y; the identity for slope None."""
    mean, rstd = statistics(x, groups, eps)
    xh = (_split(x, groups) - _statistic(mean, groups, x)) * _statistic(rstd, groups, x)
    y = xh * _channels(weight, groups, x)
    if bias is not None:
        y = y + _channels(bias, groups, x)
    y = _joined(y, x)
    return (y if slope is None else torch.where(y > 0, y, slope * y)), mean, rstd


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
    """The gradients in x, weight and bias: r (a - m(a) - xh k_a), sum(a0 xh), sum(a0).

    z is norm_act's result, whose sign gives act'; None where there is no activation. The last two have shape (C,) and
    the accumulation dtype, or shape (0,) unless `need_affine`.
    """
    r = _statistic(rstd, groups, x)
    xh = (_split(x, groups) - _statistic(mean, groups, x)) * r
    a0 = _slopes(z, groups, slope, x) * _split(grad_out, groups)
    a = _channels(weight, groups, x) * a0
    grad_x = _joined(r * (a - _mean(a, groups) - xh * _mean(xh * a, groups)), x)
    if not need_affine:
        return grad_x, mean.new_empty(0), mean.new_empty(0)
    return grad_x, _channel_sum(a0 * xh), _channel_sum(a0)


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
    """The derivative of <grad_x, tangent> in grad_out, x and weight. With b the tangent, b~ = b - m(b) - xh k_b and
    a~ = a - m(a) - xh k_a: act' gamma r b~, -r^2 (Q xh + k_a b~ + k_b a~), and r sum(a0 b~), of shape (C,) in the
    accumulation dtype."""
    r = _statistic(rstd, groups, x)
    xh = (_split(x, groups) - _statistic(mean, groups, x)) * r
    act, b = _slopes(z, groups, slope, x), _split(tangent, groups)
    gamma = _channels(weight, groups, x)
    a0 = act * _split(grad_out, groups)
    a = gamma * a0
    m_a, m_b = _mean(a, groups), _mean(b, groups)
    k_a, k_b = _mean(xh * a, groups), _mean(xh * b, groups)
    q = _mean(a * b, groups) - m_a * m_b - k_a * k_b
    b_centred, a_centred = b - m_b - xh * k_b, a - m_a - xh * k_a
    in_x = -(r * r) * (q * xh + k_a * b_centred + k_b * a_centred)
    return _joined(act * gamma * r * b_centred, x), _joined(in_x, x), _channel_sum(r * a0 * b_centred)
