"""`python -m benchmarks.ablation`: what each part of the engine gains, switched on one after the other.

The LS-GAN-PG step of a critic, from the usual code to ours. Every variant computes the same gradients, which are
compared before a time counts:

    usual          three forwards, loss.backward()
    best           one forward shared by loss and penalty, gradients of the parameters alone
    activations    + ReLU and its like, and pools: no zeros for a second derivative that does not exist
    convolutions   + convolutions and dense layers: weight gradients by the weight-gradient primitive, none unused
    norms          + fused second derivative of norms, and of smooth activations
    first layers   + the C++ kernel for input gradients of few channels (on a CPU)
    gpkernels      + one backward for loss and penalty: `gp.score_and_penalty`

With --picture the result is drawn as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gpkernels as gp
from benchmarks.machine import parser, save_picture
from benchmarks.problems import Problem, Step, assign, hinge, linear
from benchmarks.steps import Setting, command
from gpkernels.double_backward import bilinear, mode
from gpkernels.double_backward.table import BY_FUNCTION, ROWS

CRITICS = ("DCGAN none", "DCGAN batch", "DCGAN layer", "SNGAN-ResNet", "WGAN-GP-ResNet", "StyleGAN2")
SETTINGS = [
    *(Setting("LS-GAN-PG step", critic, width) for width in (64, 16) for critic in CRITICS[:3]),
    *(Setting("LS-GAN-PG step", critic, 16, 16) for critic in CRITICS[3:]),
]
QUICK = [Setting("LS-GAN-PG step", critic, 8, 8, 32) for critic in CRITICS]

_FLAT = [
    row.name for row in ROWS if not row.curved and ("relu" in row.name or "pool" in row.name or "tanh" in row.name)
]
_BILINEAR = [row.name for row in ROWS if row.name.startswith(("conv", "linear"))]
PARTS: dict[str, tuple[Sequence[str], bool]] = {
    "activations": (_FLAT, False),
    "convolutions": ([*_FLAT, *_BILINEAR], False),
    "norms": ([row.name for row in ROWS], False),
    "first layers": ([row.name for row in ROWS], True),
}
"""Rows of the engine's table, and whether the C++ kernel for input gradients may be taken."""


@contextlib.contextmanager
def only(rows: Sequence[str], first_layers: bool) -> Iterator[None]:
    """The engine with a part of its table."""
    table, wins = mode.BY_FUNCTION, bilinear.wins
    never: Callable[..., bool] = lambda *args: False  # noqa: E731
    try:
        mode.BY_FUNCTION = {function: row for function, row in BY_FUNCTION.items() if row.name in rows}  # type: ignore[misc]
        bilinear.wins = wins if first_layers else never  # type: ignore[assignment]
        yield
    finally:
        mode.BY_FUNCTION, bilinear.wins = table, wins  # type: ignore[misc]


def variants(problem: Problem, name: str) -> Mapping[str, Step]:
    critic, real, fake = problem.critic, problem.real, problem.fake

    def with_part(rows: Sequence[str], first_layers: bool) -> Step:
        def step() -> None:
            with only(rows, first_layers):
                x = real.detach().requires_grad_()
                with gp.fast_double_backward():
                    scores = critic(x)
                (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
                assign(critic, hinge(scores, critic(fake)) + linear(grad))

        return step

    return {part: with_part(*how) for part, how in PARTS.items()}


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time over that of the step without a penalty, a panel a critic, a bar a part."""
    from matplotlib.figure import Figure

    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        cases.setdefault(f"{row['case']}, batch {row['batch']}", {})[row["variant"]] = float(row["of_no_penalty"])
    order = ["usual", "best", *PARTS, "gpkernels"]
    columns = 3
    figure = Figure(figsize=(12, 2.6 * -(-len(cases) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(cases) // columns), columns, squeeze=False, sharex=True).flat
    for axes, (case, times) in zip(panels, cases.items(), strict=False):
        bars = axes.barh(order, [times[name] for name in order], color=["0.6", "0.75", *["C0"] * len(PARTS), "C1"])
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(case.partition(", ")[2], fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in list(panels):
        axes.set_visible(False)
    save_picture(figure, path, rows, "LS-GAN-PG critic step, in multiples of the step without a penalty")


def main(arguments: Sequence[str] | None = None) -> None:
    command(parser("ablation", __doc__, 9, picture=True), arguments, SETTINGS, QUICK, variants, draw)


if __name__ == "__main__":
    main()
