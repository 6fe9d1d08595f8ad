"""`python -m benchmarks.peers`: steps by the other ways there are to differentiate twice.

Penalty steps, and whole steps with a loss, in as few forwards as "best". "func.grad" nests torch.func.grad; "func.grad,
compiled" hands that to torch.compile; "make_fx, no zeros" traces it into a graph of aten calls and takes out what is
known to be zero; "jax" is jax.jit of nested jax.grad of the same critic, where jax is installed (sequences of
convolutions, dense layers and LeakyReLU). All give the parameter gradients, which are compared before a time counts;
their BatchNorm keeps no running statistics, which transforms cannot write. What a peer cannot do is said, with its
error. On a GPU the traced graph also runs as a CUDA graph (for ours see `benchmarks.graphs`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks import jax_critics, zeros
from benchmarks.graphs import graphed
from benchmarks.machine import parser
from benchmarks.problems import Problem, Step
from benchmarks.steps import Setting, command

SETTINGS = [
    *(Setting("penalty step", f"DCGAN {norm}", width) for width in (64, 16) for norm in ("none", "batch", "layer")),
    Setting("penalty step", "WGAN-GP-ResNet", 16, 16),
    *(Setting("penalty step", "MLP", 1024, batch, 32) for batch in (64, 1024)),
    *(
        setting
        for step in ("LS-GAN-PG step", "WGAN-GP step")
        for setting in (
            *(Setting(step, f"DCGAN {norm}", width) for width in (64, 16) for norm in ("none", "batch")),
            *(Setting(step, "MLP", 1024, batch, 32) for batch in (64, 1024)),
        )
    ),
]
QUICK = [
    *(Setting("penalty step", critic, 8, 8, 32) for critic in ("DCGAN none", "MLP")),
    Setting("LS-GAN-PG step", "DCGAN none", 8, 8, 32),
    Setting("WGAN-GP step", "MLP", 64, 64, 32),
]

Gradients = Callable[..., Mapping[str, Tensor]]
"""From parameters and a problem's inputs to the gradient of its objective in each parameter."""


def nested(problem: Problem) -> Gradients:
    critic = _without_statistics(problem.critic)

    def total(parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        def scores(x: Tensor) -> Tensor:
            return functional_call(critic, parameters, (x,))

        def summed(x: Tensor) -> tuple[Tensor, Tensor]:
            found = scores(x)
            return found.sum(), found

        def scores_and_grad(x: Tensor) -> tuple[Tensor, Tensor]:
            grad, found = torch.func.grad(summed, has_aux=True)(x)
            return found, grad

        return problem.objective(scores, scores_and_grad, *inputs)

    return torch.func.grad(total)


def without_zeros(problem: Problem) -> Gradients:
    """`nested`, traced for these shapes."""
    graph = make_fx(nested(problem))(_parameters(problem.critic), *problem.inputs())
    zeros.propagate(graph)
    return graph


def _without_statistics(critic: nn.Module) -> nn.Module:
    critic = copy.deepcopy(critic)
    for module in critic.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return critic


def _parameters(critic: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in critic.named_parameters()}


def variants(problem: Problem, name: str) -> dict[str, Step]:
    """The peers that can do this critic, as steps that leave gradients in its parameters."""
    makers: dict[str, Callable[[], Gradients]] = {
        "func.grad": lambda: nested(problem),
        "func.grad, compiled": lambda: torch.compile(nested(problem), fullgraph=True),
        "make_fx, no zeros": lambda: without_zeros(problem),
        "jax": lambda: jax_critics.gradients(problem),
    }
    found: dict[str, Step] = {}

    def attempt(peer: str, make: Callable[[], Step]) -> None:
        try:
            step = make()
            step()
        except Exception as error:  # whatever a peer cannot do
            print(f"{name}: {peer} cannot: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}")
        else:
            found[peer] = step

    for peer, make in makers.items():
        attempt(peer, lambda make=make: _step(problem, make()))  # type: ignore[misc]
    if problem.real.is_cuda and "make_fx, no zeros" in found:
        attempt("make_fx, no zeros, graphed", lambda: graphed(problem.critic, found["make_fx, no zeros"]))
    return found


def _step(problem: Problem, gradients: Gradients) -> Step:
    def run() -> None:
        found = gradients(_parameters(problem.critic), *problem.inputs())
        for name, parameter in problem.critic.named_parameters():
            parameter.grad = found[name]

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    command(parser("peers", __doc__, 9), arguments, SETTINGS, QUICK, variants)


if __name__ == "__main__":
    main()
