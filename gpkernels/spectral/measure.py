"""Singular values of weights, and the operator norm of convolutions, measured in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels._checks import check_count, fail
from gpkernels.ops.spectral_norm import reference
from gpkernels.spectral.convolution import Convolution
from gpkernels.spectral.register import default_dim, weight_before


@torch.no_grad()
def singular_values(
    module: Any, k: int = 1, *, name: str = "weight", dim: int | None = None, iterations: int = 30
) -> Any:
    """The k largest singular values of a weight before spectral normalisation, by subspace iteration.

    Args:
        module: a module, parametrized (in any way) or not, or the handle of `spectral_norm_all`.
        k: at most min(rows, cols) of the weight; for a handle, smaller weights give as many as they have.
        name, dim: the weight and the dimension of its rows (default as in `spectral_norm`); not for a handle.
        iterations: each is two products with k + 8 vectors; the error of the i-th value falls as (s_{k+9} / s_i)^(4n).

    Returns:
        Tensor (k,), in the accumulation dtype, largest first; for a handle a dict of them by name. Draws no random
        numbers from torch's generators.
    Raises:
        TypeError, ValueError: another type of argument, k out of range.
    """
    check_count("k", k)
    check_count("iterations", iterations)
    if hasattr(module, "layers"):
        found = {}
        for key, (layer, weight_name, layer_dim) in module.layers.items():
            w = reference.matrix(weight_before(layer, weight_name), layer_dim)
            found[key] = _largest(w, min(k, *w.shape), iterations)
        return found
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: wanted a module or a handle, got {type(module).__name__}")
    w = reference.matrix(weight_before(module, name), default_dim(module) if dim is None else dim)
    if k > min(w.shape):
        raise fail("k", f"at most {min(w.shape)}, the smaller side of the weight", k)
    return _largest(w, k, iterations)


def _largest(w: Tensor, k: int, iterations: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = min(k + 8, *w.shape)
    q = torch.randn(w.shape[1], size, generator=generator, dtype=w.dtype, device="cpu").to(w.device)
    for _ in range(iterations):
        p, _ = torch.linalg.qr(w @ q)
        q, _ = torch.linalg.qr(w.mT @ p)
    return torch.linalg.svdvals(w @ q)[:k]


@torch.no_grad()
def convolution_norm(module: nn.Module, input_shape: Sequence[int], *, iterations: int = 100) -> Tensor:
    """The operator norm of a convolution, max ||conv(x)|| / ||x|| over inputs of one shape, with its current weight.

    The matrix norm that `spectral_norm` uses is that of the weight reshaped: it differs from this one by a factor that
    depends on stride, padding and the kernel (at most sqrt(kh kw) either way, for stride 1).

    Args:
        module: Conv1d-3d or ConvTranspose1d-3d, of any stride, padding mode, dilation and groups, normalised or not.
        input_shape: (channels, *spatial) of an input, or its spatial part alone.
        iterations: of the power method on x; each costs a convolution and its adjoint at batch size 1.

    Returns:
        Tensor of shape (), in the accumulation dtype.
    Raises:
        TypeError, ValueError: not a convolution, an input shape that does not fit it.
    """
    check_count("iterations", iterations)
    conv = Convolution.of(module, input_shape)
    weight = conv.wide(module.weight)  # type: ignore[arg-type]
    x = conv.start(weight)
    for _ in range(iterations):
        x = conv.iterate(weight, x, 0.0)
    return torch.linalg.vector_norm(conv(weight, x))
