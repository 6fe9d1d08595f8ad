"""`python -m benchmarks.graphs`: the steps as CUDA graphs, where the host no longer counts; needs a GPU.

Every variant of `benchmarks.steps` again with "graphed" to its name, captured by `gp.graphed`. Elsewhere than on a GPU
the steps are measured as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import gpkernels as gp
from benchmarks.machine import parser
from benchmarks.problems import Problem, Step
from benchmarks.steps import Setting, command

SETTINGS = [
    Setting(step, f"DCGAN {norm}", width)
    for step in ("penalty step", "LS-GAN-PG step", "WGAN-GP step")
    for width in (64, 16)
    for norm in ("none", "batch")
]
QUICK = [Setting("LS-GAN-PG step", "DCGAN batch", 8, 8, 32)]


def graphed(critic: nn.Module, step: Step) -> Step:
    """The step as a CUDA graph, captured, that leaves the gradients it writes in the parameters."""

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


def variants(problem: Problem, name: str) -> dict[str, Step]:
    if not problem.real.is_cuda:
        print(f"{name}: CUDA graphs need a GPU, steps alone")
        return {}
    return {f"{variant}, graphed": graphed(problem.critic, step) for variant, step in problem.variants.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    command(parser("graphs", __doc__, 9), arguments, SETTINGS, QUICK, variants)


if __name__ == "__main__":
    main()
