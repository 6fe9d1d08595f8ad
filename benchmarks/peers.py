"""`python -m benchmarks.peers`: steps by the other ways there are to differentiate twice.

Penalty steps, and whole steps with a loss, in as few forwards as "best". "func.grad" nests torch.func.grad; "func.grad,
compiled" hands that to torch.compile; "make_fx, no zeros" traces it into a graph of aten calls and takes out what is
known to be zero; "jax" is jax.jit of nested jax.grad of the same critic, where jax is installed (sequences of
convolutions, dense layers and LeakyReLU). All give the parameter gradients, which are compared before a time counts;
their BatchNorm keeps no running statistics, which transforms cannot write. What a peer cannot do is said, with its
error. On a GPU all but JAX and torch.compile also run as CUDA graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import gpkernels as gp
from benchmarks import jax_critics, zeros
from benchmarks.machine import parser
from benchmarks.problems import Problem, Step
from benchmarks.steps import OPAQUE, Setting, command

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
    if problem.real.is_cuda:
        eager = {peer: step for peer, step in found.items() if not peer.endswith(OPAQUE)}
        for peer, step in {**problem.variants, **eager}.items():
            attempt(f"{peer}, graphed", lambda step=step: _graphed(problem.critic, step))  # type: ignore[misc]
    return found


def _graphed(critic: nn.Module, step: Step) -> Step:
    """The step as a CUDA graph that leaves the gradients it writes in the parameters."""

    def whole() -> dict[str, Tensor]:
        critic.zero_grad(set_to_none=True)
        step()
        return {name: p.grad for name, p in critic.named_parameters() if p.grad is not None}

    replay = gp.graphed(whole, warmup=3)
    for _ in range(4):  # the last captures
        replay()

    def run() -> None:
        grads = replay()
        for name, parameter in critic.named_parameters():
            parameter.grad = grads.get(name)

    return run


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
