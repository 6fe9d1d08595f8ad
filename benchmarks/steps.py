"""`python -m benchmarks.steps`: a critic's penalty step and its whole training step, against autograd.

Variants compute the same and take turns. "usual" is the code one finds, "best" the fastest plain torch we know (one
forward shared by loss and penalty, gradients of the parameters alone), "no penalty" the same step without a penalty.
Before a time counts, the parameter gradients are compared. Counts do not depend on the machine: `ops` are the calls
that reach a device (views and allocations left out), `conv_units` the convolutions, forward or either gradient, and
`mib_moved` the bytes that these calls read and write. `peak_mib` is what a step adds to the memory of tensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import _SpectralNorm

import gpkernels as gp
from benchmarks import counts, timing
from benchmarks.critics import CRITICS
from benchmarks.machine import machine, parser, save

Step = Callable[[], None]


def two_sided(grad: Tensor) -> Tensor:
    return 10 * (grad.flatten(1).norm(2, dim=1) - 1).square().mean()


def linear(grad: Tensor) -> Tensor:
    return 10 * grad.flatten(1).norm(2, dim=1).mean()


def half_square(grad: Tensor) -> Tensor:
    return 10 * 0.5 * grad.flatten(1).square().sum(1).mean()


def hinge(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """LS-GAN's, on pairs with a margin of 1."""
    return (1 + real_scores - fake_scores).relu().mean()


def at(critic: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and their gradient in x, as everybody writes it."""
    x = x.detach().requires_grad_()
    scores = critic(x)
    return scores, torch.autograd.grad(scores.sum(), x, create_graph=True)[0]


def penalty_step(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Step]:
    def usual() -> None:
        two_sided(at(critic, real)[1]).backward()

    def best() -> None:
        assign(critic, two_sided(at(critic, real)[1]))

    def ours() -> None:
        gp.gradient_penalty(critic, real, kind="r1", form="two_sided").backward()

    return {"usual": usual, "best": best, "gpkernels": ours}


Loss = Callable[[Tensor, Tensor], Tensor]
"""Of the scores of real and of fake images."""


def step_at_real(loss: Loss, penalty: Callable[[Tensor], Tensor], kind: str) -> Callable[..., dict[str, Step]]:
    """A critic's step with a penalty at the real images themselves, which can share their forward."""

    def make(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Step]:
        def none() -> None:
            loss(critic(real), critic(fake)).backward()

        def usual() -> None:
            total = loss(critic(real), critic(fake))
            (total + penalty(at(critic, real)[1])).backward()

        def best() -> None:
            scores, grad = at(critic, real)
            assign(critic, loss(scores, critic(fake)) + penalty(grad))

        def ours() -> None:
            scores, value = gp.score_and_penalty(critic, real, kind=kind)
            (loss(scores, critic(fake)) + value).backward()

        return {"no penalty": none, "usual": usual, "best": best, "gpkernels": ours}

    return make


def step_around(loss: Loss, points: Callable[[Tensor, Tensor], Points]) -> Callable[..., dict[str, Step]]:
    """A critic's step with the two-sided penalty at points of their own."""

    def make(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Step]:
        usual_points, best_points, our_penalty = points(real, fake)

        def none() -> None:
            loss(critic(real), critic(fake)).backward()

        def usual() -> None:
            total = loss(critic(real), critic(fake))
            (total + two_sided(at(critic, usual_points())[1])).backward()

        def best() -> None:
            total = loss(critic(real), critic(fake))
            assign(critic, total + two_sided(at(critic, best_points())[1]))

        def ours() -> None:
            (loss(critic(real), critic(fake)) + our_penalty(critic)).backward()

        return {"no penalty": none, "usual": usual, "best": best, "gpkernels": ours}

    return make


class Points(NamedTuple):
    """Where a penalty is taken, by the usual code and by the best, and our penalty there."""

    usual: Callable[[], Tensor]
    best: Callable[[], Tensor]
    penalty: Callable[[nn.Module], Tensor]


def between(real: Tensor, fake: Tensor) -> Points:
    """WGAN-GP's, with weights that are the same for all."""
    eps = torch.rand(len(real), device=real.device)
    column = eps.view(-1, *[1] * (real.dim() - 1))
    return Points(
        lambda: column * real + (1 - column) * fake,
        lambda: torch.lerp(fake, real, column),
        lambda critic: gp.gradient_penalty(critic, real, fake, eps=eps),
    )


def near(real: Tensor, fake: Tensor) -> Points:
    """DRAGAN's, with noise that is the same for all: kind "local" would draw its own."""
    noise = torch.rand_like(real) * 2 - 1

    def point() -> Tensor:
        return real + 0.5 * real.std() * noise

    return Points(point, point, lambda critic: gp.gradient_penalty(critic, point(), kind="r1", form="two_sided"))


def non_saturating(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return softplus(-real_scores).mean() + softplus(fake_scores).mean()


def wasserstein(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return fake_scores.mean() - real_scores.mean()


def assign(critic: nn.Module, loss: Tensor) -> None:
    parameters = list(critic.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.grad = grad


def freeze(critic: nn.Module) -> None:
    """Torch's spectral norm moves its vectors at every forward: variants with fewer would see other weights."""
    for module in critic.modules():
        if isinstance(module, _SpectralNorm):
            module.eval()


STEPS = {
    "penalty step": penalty_step,
    "LS-GAN-PG step": step_at_real(hinge, linear, "ls_gan_pg"),
    "WGAN-GP step": step_around(wasserstein, between),
    "R1 step": step_at_real(non_saturating, half_square, "r1"),
    "DRAGAN step": step_around(non_saturating, near),
}


class Problem(NamedTuple):
    """What the variants share, and the variants."""

    critic: nn.Module
    real: Tensor
    fake: Tensor
    variants: dict[str, Step]


@dataclass(frozen=True)
class Setting:
    """A critic of `CRITICS`, its width in the units of its `build`. bfloat16 is autocast's: parameters stay float32."""

    step: str
    critic: str
    width: int
    batch: int = 64
    size: int = 64
    dtype: str = "float32"

    @property
    def name(self) -> str:
        kind, _, norm = self.critic.partition(" ")
        return f"{self.step}, {kind}-{self.size}{norm and ' '}{norm}, width {self.width}"

    def make(self, device: torch.device) -> Problem:
        torch.manual_seed(0)
        row = CRITICS[self.critic]
        critic = row.build(self.width, self.size).to(device)
        if self.step != "penalty step":
            freeze(critic)
        real, fake = (torch.randn(self.batch, *row.shape(self.size), device=device) for _ in range(2))
        return Problem(critic, real, fake, STEPS[self.step](critic, real, fake))


NORMS = ("none", "spectral", "batch", "instance", "layer")

SETTINGS = [
    *(Setting("penalty step", f"DCGAN {norm}", width) for width in (64, 16) for norm in NORMS),
    *(
        Setting(step, f"DCGAN {norm}", width)
        for step in ("LS-GAN-PG step", "WGAN-GP step")
        for width in (64, 16)
        for norm in ("none", "batch")
    ),
]
QUICK = [Setting(step, f"DCGAN {norm}", 16, 16, 32) for step in STEPS for norm in ("none", "batch")]


OPAQUE = ("compiled", "jax", "graphed")
"""How the names of variants end whose calls torch does not see, so that nothing is counted."""

Peers = Callable[[Problem, str], Mapping[str, Step]]
"""More variants of a problem, whose name is for messages."""

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
PEER_TOLERANCE = 1e-2  # other libraries round otherwise, and an activation next to 0 may fall on the other side


def differs(critic: nn.Module, variants: Mapping[str, Step], tolerance: float) -> str:
    """In what the variants' gradients differ from those of "usual" by more than rounding; empty when in nothing.

    Each parameter's by its norm, or a thousandth of the whole gradient's where that is larger; of bfloat16 the whole
    gradient alone. The running state of norms is put back before each, so that all see the same critic.
    """
    start = {name: value.clone() for name, value in critic.state_dict().items()}
    grads: dict[str, list[Tensor]] = {}
    for name in variants:
        if name == "no penalty":
            continue
        critic.load_state_dict(start)
        critic.zero_grad()
        variants[name]()
        grads[name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters()]
    critic.load_state_dict(start)
    total = _norm(grads["usual"])
    for name, found in grads.items():
        errors = [(a - b) for a, b in zip(grads["usual"], found, strict=True)]
        if not _norm(errors) / total < tolerance:
            return f"{name}: the gradient differs by {_norm(errors) / total:.1e}"
        for (key, _), a, error in zip(critic.named_parameters(), grads["usual"], errors, strict=True):
            relative = error.norm() / torch.maximum(a.norm(), 1e-3 * total)
            if tolerance <= 0.01 and not relative < tolerance:
                return f"{name}: the gradient of {key} differs by {relative:.1e}"
    return ""


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def measure(setting: Setting, device: torch.device, rounds: int, peers: Peers | None = None) -> list[dict[str, Any]]:
    """A row a variant; none where results differ, which is said. `peers` adds variants."""
    problem = setting.make(device)
    critic, variants = problem.critic, problem.variants
    if peers is not None:
        variants = {**variants, **peers(problem, setting.name)}
    variants = {name: _in_precision(step, setting.dtype, device) for name, step in variants.items()}
    own = {name: variants[name] for name in problem.variants}
    difference = differs(critic, own, TOLERANCES[setting.dtype])
    if difference:
        print(f"{setting.name}: {difference}, not timed")
        return []
    for name in set(variants) - set(own):
        difference = differs(critic, {"usual": variants["usual"], name: variants[name]}, PEER_TOLERANCE)
        if difference:
            print(f"{setting.name}: {difference}, not timed")
            del variants[name]
    variants = {name: _cleared(step, critic) for name, step in variants.items()}
    times = timing.interleaved(variants, device, rounds)
    base = times.get("no penalty", times["usual"]).median
    rows = []
    for name, taken in times.items():
        counted = None if name.endswith(OPAQUE) else counts.count(variants[name])
        critic.zero_grad(set_to_none=True)
        peak = None if name.endswith(OPAQUE) else counts.peak_bytes(variants[name], device)
        rows.append(
            {
                "case": setting.name,
                "batch": setting.batch,
                "dtype": setting.dtype,
                "variant": name,
                **taken.milliseconds(),
                "of_no_penalty": round(taken.median / base, 3) if "no penalty" in times else "",
                "speedup_over_usual": round(times["usual"].median / taken.median, 3),
                "speedup_over_best": round(times["best"].median / taken.median, 3),
                "ops": "" if counted is None else counted.ops,
                "conv_units": "" if counted is None else counted.convolutions,
                "mib_moved": "" if counted is None else round(counted.bytes / 2**20, 1),
                "peak_mib": "" if peak is None else round(peak / 2**20, 1),
            }
        )
    return rows


def _cleared(step: Step, critic: nn.Module) -> Step:
    def run() -> None:
        critic.zero_grad(set_to_none=True)
        step()

    return run


def _in_precision(step: Step, dtype: str, device: torch.device) -> Step:
    if dtype == "float32":
        return step

    def run() -> None:
        with torch.autocast(device.type, getattr(torch, dtype)):
            step()

    return run


def line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['case']:44} {row['batch']:>3} {row['dtype']:8} {row['variant']:20} {row['median_ms']:>9} ms "
        f"{row['of_no_penalty']:>6} of none {row['speedup_over_usual']:>6} x usual "
        f"{row['speedup_over_best']:>6} x best "
        f"{row['ops']:>4} ops {row['conv_units']:>3} conv {row['mib_moved']:>8} MiB moved {row['peak_mib']:>7} MiB peak"
    )


def run(
    settings: Iterable[Setting],
    options: argparse.Namespace,
    rounds: int,
    peers: Peers | None = None,
) -> list[dict[str, Any]]:
    """Measures the settings that `--only` names, prints a line a row, and keeps all in `--out` after each setting."""
    device = torch.device(options.device)
    about, rows = machine(device), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for setting in settings:
        if options.only not in setting.name:
            continue
        for row in measure(setting, device, rounds, peers):
            rows.append({**row, **about})
            print(line(row), flush=True)
        if options.out and rows:
            save(options.out, rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("steps", __doc__, 9).parse_args(arguments)
    run(QUICK if options.quick else SETTINGS, options, 3 if options.quick else options.rounds)


if __name__ == "__main__":
    main()
