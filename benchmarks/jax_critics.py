"""Sequential critics in JAX: the same layers, weights and penalty."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def gradients(critic: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Mapping[str, Tensor]]:
    """(parameters, x) to the gradient of the two-sided penalty in each parameter, by jax.jit(jax.grad) of jax.grad.

    Tensors pass between the libraries by DLPack, without copies. Raises ImportError without jax, TypeError,
    naming the layer, for a critic that is not a sequence of Conv2d, Linear, LeakyReLU and Flatten.
    """
    jax = importlib.import_module("jax")
    jnp = jax.numpy
    layers = list(critic.named_children()) if isinstance(critic, nn.Sequential) else [("", critic)]
    for _, layer in layers:
        if type(layer) not in _LAYERS or hasattr(layer, "parametrizations"):
            raise TypeError(f"no JAX form of {type(layer).__name__}")

    def scores(parameters: dict[str, Any], x: Any) -> Any:
        for name, layer in layers:
            x = _LAYERS[type(layer)](jax, layer, parameters.get(f"{name}.weight"), parameters.get(f"{name}.bias"), x)
        return x.sum()

    def penalty(parameters: dict[str, Any], x: Any) -> Any:
        grad = jax.grad(scores, 1)(parameters, x).reshape(len(x), -1)
        return 10 * ((jnp.linalg.norm(grad, axis=1) - 1) ** 2).mean()

    compiled = jax.jit(jax.grad(penalty))

    def run(parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        given = {name: jax.dlpack.from_dlpack(value) for name, value in parameters.items()}
        found = jax.block_until_ready(compiled(given, jax.dlpack.from_dlpack(x)))
        return {name: torch.from_dlpack(value) for name, value in found.items()}

    return run


def _conv2d(jax: Any, layer: Any, weight: Any, bias: Any, x: Any) -> Any:
    padding = [(p, p) for p in layer.padding]
    y = jax.lax.conv_general_dilated(
        x, weight, layer.stride, padding, rhs_dilation=layer.dilation, feature_group_count=layer.groups
    )
    return y if bias is None else y + bias[:, None, None]


def _linear(jax: Any, layer: Any, weight: Any, bias: Any, x: Any) -> Any:
    return x @ weight.T + (0 if bias is None else bias)


def _leaky_relu(jax: Any, layer: Any, weight: Any, bias: Any, x: Any) -> Any:
    return jax.numpy.where(x > 0, x, layer.negative_slope * x)


def _flatten(jax: Any, layer: Any, weight: Any, bias: Any, x: Any) -> Any:
    return x.reshape(len(x), -1)


_LAYERS: dict[type, Callable[..., Any]] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.LeakyReLU: _leaky_relu,
    nn.Flatten: _flatten,
}
