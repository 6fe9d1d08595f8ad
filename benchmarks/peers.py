"""`python -m benchmarks.peers`: the penalty step by the other ways there are to differentiate twice.

"func.grad" nests torch.func.grad; "func.grad, compiled" hands that to torch.compile; "make_fx, no zeros" traces it into
a graph of aten calls and takes out what is known to be zero; "jax" is jax.jit of nested jax.grad of the same critic,
where jax is installed (sequences of convolutions, dense layers and LeakyReLU). All give the parameter gradients, which
are compared before a time counts; their BatchNorm keeps no running statistics, which transforms cannot write. What a
peer cannot do is said, with its error. On a GPU eager code and ours also run as CUDA graphs.
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
from benchmarks.steps import Problem, Setting, Step, run, two_sided

SETTINGS = [
    *(Setting("penalty step", f"DCGAN {norm}", width) for width in (64, 16) for norm in ("none", "batch", "layer")),
    Setting("penalty step", "WGAN-GP-ResNet", 16, 16),
    *(Setting("penalty step", "MLP", 1024, batch, 32) for batch in (64, 1024)),
]
QUICK = [Setting("penalty step", "DCGAN none", 8, 8, 32), Setting("penalty step", "MLP", 64, 64, 32)]

Gradients = Callable[[dict[str, Tensor], Tensor], Mapping[str, Tensor]]
"""From parameters and x to the gradient of the penalty in each parameter."""


def nested(critic: nn.Module) -> Gradients:
    critic = _without_statistics(critic)

    def penalty(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        def total(x: Tensor) -> Tensor:
            return functional_call(critic, parameters, (x,)).sum()

        return two_sided(torch.func.grad(total)(x))

    return torch.func.grad(penalty)


def without_zeros(critic: nn.Module, x: Tensor) -> Gradients:
    """`nested`, traced for this shape."""
    graph = make_fx(nested(critic))(_parameters(critic), x)
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
    critic, x = problem.critic, problem.real
    makers: dict[str, Callable[[], Gradients]] = {
        "func.grad": lambda: nested(critic),
        "func.grad, compiled": lambda: torch.compile(nested(critic), fullgraph=True),
        "make_fx, no zeros": lambda: without_zeros(critic, x),
        "jax": lambda: jax_critics.gradients(critic),
    }
    found: dict[str, Step] = {}
    for peer, make in makers.items():
        try:
            gradients = make()
            gradients(_parameters(critic), x)
        except Exception as error:  # whatever a peer cannot do
            print(f"{name}: {peer} cannot: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}")
            continue
        found[peer] = _step(critic, gradients, x)
    if x.is_cuda:
        found |= {f"{peer}, graphed": _graphed(critic, step) for peer, step in problem.variants.items()}
    return found


def _graphed(critic: nn.Module, step: Step) -> Step:
    """The step as a CUDA graph that leaves the gradients it writes in the parameters."""

    def whole() -> dict[str, Tensor]:
        critic.zero_grad(set_to_none=True)
        step()
        return {name: p.grad for name, p in critic.named_parameters() if p.grad is not None}

    replay = gp.graphed(whole)

    def run() -> None:
        grads = replay()
        for name, parameter in critic.named_parameters():
            parameter.grad = grads.get(name)

    return run


def _step(critic: nn.Module, gradients: Gradients, x: Tensor) -> Step:
    def run() -> None:
        found = gradients(_parameters(critic), x)
        for name, parameter in critic.named_parameters():
            parameter.grad = found[name]

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("peers", __doc__, 9).parse_args(arguments)
    run(QUICK if options.quick else SETTINGS, options, 3 if options.quick else options.rounds, variants)


if __name__ == "__main__":
    main()
