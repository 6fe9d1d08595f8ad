"""Sequential critics in JAX: the same layers, weights, losses and penalties."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import problems
from benchmarks.problems import Objective, Problem


def gradients(problem: Problem) -> Callable[..., Mapping[str, Tensor]]:
    """(parameters, *inputs) to the gradient of the objective in each parameter, by jax.jit of nested jax.grad.

    Tensors pass between the libraries by DLPack, without copies. Raises ImportError without jax, TypeError,
    naming the layer, for a critic that is not a sequence of Conv2d, Linear, LeakyReLU and Flatten.
    """
    jax = importlib.import_module("jax")
    critic = problem.critic
    layers = list(critic.named_children()) if isinstance(critic, nn.Sequential) else [("", critic)]
    for _, layer in layers:
        if type(layer) not in _LAYERS or hasattr(layer, "parametrizations"):
            raise TypeError(f"no JAX form of {type(layer).__name__}")

    objective = in_jax(problem.objective)

    def total(parameters: dict[str, Any], *inputs: Any) -> Any:
        def scores(x: Any) -> Any:
            for name, layer in layers:
                weight, bias = (parameters.get(f"{name}.{which}") for which in ("weight", "bias"))
                x = _LAYERS[type(layer)](jax, layer, weight, bias, x)
            return x

        def summed(x: Any) -> Any:
            found = scores(x)
            return found.sum(), found

        def scores_and_grad(x: Any) -> Any:
            grad, found = jax.grad(summed, has_aux=True)(x)
            return found, grad

        return objective(scores, scores_and_grad, *inputs)

    compiled = jax.jit(jax.grad(total))

    def run(parameters: dict[str, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
        given = {name: jax.dlpack.from_dlpack(value) for name, value in parameters.items()}
        found = jax.block_until_ready(compiled(given, *(jax.dlpack.from_dlpack(x) for x in inputs)))
        return {name: torch.from_dlpack(value) for name, value in found.items()}

    return run


def in_jax(objective: Objective) -> Objective:
    """The same objective of JAX's arrays. Raises KeyError, naming the function, where one has no form here."""
    jax = importlib.import_module("jax")
    jnp, softplus = jax.numpy, jax.nn.softplus

    def norms(grad: Any) -> Any:
        return jnp.linalg.norm(grad.reshape(len(grad), -1), axis=1)

    forms: dict[Callable[..., Any] | None, Callable[..., Any] | None] = {
        None: None,
        problems.two_sided: lambda grad: 10 * ((norms(grad) - 1) ** 2).mean(),
        problems.linear: lambda grad: 10 * norms(grad).mean(),
        problems.half_square: lambda grad: 10 * 0.5 * (grad.reshape(len(grad), -1) ** 2).sum(1).mean(),
        problems.hinge: lambda real, fake: jnp.maximum(1 + real - fake, 0).mean(),
        problems.non_saturating: lambda real, fake: softplus(-real).mean() + softplus(fake).mean(),
        problems.wasserstein: lambda real, fake: fake.mean() - real.mean(),
    }
    penalty = forms[objective.penalty]
    assert penalty is not None
    return Objective(penalty, forms[objective.loss])


def _conv2d(jax: Any, layer: Any, weight: Any, bias: Any, x: Any) -> Any:
    padding = [(p, p) for p in layer.padding]
    y = jax.lax.conv_general_dilated(
        x, weight, layer.stride, padding, rhs_dilation=layer.dilation, feature_group_count=layer.groups
    )
    return y if bias is None else y + bias[:, None, None]


def _linear(jax: Any, layer: Any, weight: Any, bias: Any, x: Any) -> Any:
    product = jax.numpy.matmul(x, weight.T, precision="float32")  # as torch: TF32 for convolutions alone
    return product if bias is None else product + bias


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
