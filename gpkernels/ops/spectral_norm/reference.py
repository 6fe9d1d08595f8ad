"""spectral_norm in plain torch: the specification, and the backend for devices without a kernel.

A weight is the matrix W of shape (rows, cols) with rows = weight.shape[dim] and the other dimensions, in their order,
as columns. u (rows,), v (cols,) and sigma are kept in the accumulation dtype. Sources: Miyato et al. 2018,
algorithm 1, and its equation 12 for the gradient, in which u and v are constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.spectral_norm.layout import unpack


def matrix(weight: Tensor, dim: int) -> Tensor:
    """W, in the accumulation dtype."""
    w = weight.to(accumulation_dtype(weight.dtype)).movedim(dim, 0)
    return w.reshape(w.shape[0], -1)


def from_matrix(w: Tensor, dim: int, like: Tensor) -> Tensor:
    """The inverse of `matrix`, contiguous, with the shape and dtype of a weight."""
    first = like.movedim(dim, 0).shape
    return w.reshape(first).movedim(0, dim).to(like.dtype).contiguous()


def _direction(x: Tensor, otherwise: Tensor, eps: float) -> Tensor:
    """x / ||x||, or `otherwise` where the norm is at most eps or NaN."""
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm > eps, x / norm, otherwise)


def spectral_norm_iterate(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    iterations: int,
    eps: float,
) -> Tensor:
    """Moves u and v in place by so many power iterations, v <- W^T u / ||W^T u||, u <- W v / ||W v||, and returns
    sigma = u . (W v) of every layer, of shape (layers,): after an iteration it is ||W v||, without any it is what u and
    v give. A norm that is at most eps, or NaN, leaves its vector as it was.
    """
    sigmas = []
    for weight, left, right, dim in zip(weights, u, v, dims, strict=True):
        w = matrix(weight, dim)
        for _ in range(iterations):
            right.copy_(_direction(w.mT @ left, right, eps))
            image = w @ right
            left.copy_(_direction(image, left, eps))
        sigmas.append(torch.dot(left, image if iterations else w @ right))
    return torch.stack(sigmas)


def sigma(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """u . (W v), differentiable in the weight."""
    return torch.dot(u, matrix(weight, dim) @ v)


def spectral_norm_scale(weights: Sequence[Tensor], sigma: Tensor, targets: Sequence[float], eps: float) -> list[Tensor]:
    """target W / sigma, or target W where sigma is at most eps."""
    dead = sigma <= eps
    factors = torch.where(dead, 1.0, 1.0 / sigma.masked_fill(dead, 1.0))
    return [
        (weight.to(factor.dtype) * (target * factor)).to(weight.dtype)
        for weight, factor, target in zip(weights, factors.unbind(), targets, strict=True)
    ]


def spectral_norm_scale_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    vectors: Tensor,
    sigma: Tensor,
    dims: Sequence[int],
    targets: Sequence[float],
    eps: float,
) -> list[Tensor]:
    """The gradient in each weight, target (G - (<G, W> / sigma) u v^T) / sigma; target G where sigma is at most eps.
    `vectors` are u and v of all layers: see `layout.pack`."""
    u, v = unpack(vectors, weights, dims)
    results = []
    for grad, weight, left, right, s, dim, target in zip(
        grads, weights, u, v, sigma.unbind(), dims, targets, strict=True
    ):
        g, dead = matrix(grad, dim), s <= eps
        safe = s.masked_fill(dead, 1.0)
        along = torch.where(dead, 0.0, (g * matrix(weight, dim)).sum() / safe)
        results.append(from_matrix(target * (g - along * torch.outer(left, right)) / safe, dim, weight))
    return results


def spectral_norm_scale_double_backward(
    tangent: Tensor,
    grad: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    dead: Tensor,
    dim: int,
    target: float,
) -> tuple[Tensor, Tensor]:
    """The derivative of <tangent, scale_backward(grad, weight)> in grad and in weight, of one layer; differentiable in
    all three. With T the tangent, sigma = u . (W v) and q = u . (T v):
    target (T - (q / sigma) W) / sigma, and target ((2 q <G, W> / sigma - <G, T>) u v^T - q G) / sigma^2.
    """
    t, g, w = matrix(tangent, dim), matrix(grad, dim), matrix(weight, dim)
    inverse = 1.0 / torch.where(dead, 1.0, torch.dot(u, w @ v))
    live = torch.where(dead, 0.0, 1.0)
    q = live * torch.dot(u, t @ v)
    in_grad = target * inverse * (t - q * inverse * w)
    along = 2 * q * inverse * (g * w).sum() - live * (g * t).sum()
    in_weight = target * inverse.square() * (along * torch.outer(u, v) - q * g)
    return from_matrix(in_grad, dim, weight), from_matrix(in_weight, dim, weight)
