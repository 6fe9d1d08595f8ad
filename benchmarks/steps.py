"""`python -m benchmarks.steps`: a critic's penalty step and its whole training step, against autograd.

Variants compute the same and take turns. "usual" is the code one finds, "best" the fastest plain torch we know (one
forward shared by loss and penalty, gradients of the parameters alone), "no penalty" the same step without a penalty.
Before a time counts, the parameter gradients are compared. Counts do not depend on the machine: `ops` are the calls
that reach a device (views and allocations left out), `conv_units` the convolutions, forward or either gradient, and
`mib_moved` the bytes that these calls read and write. `peak_mib` is what a step adds to the memory of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gpkernels as gp
from benchmarks import counts, timing
from benchmarks.machine import machine, parser, save

Step = Callable[[], None]

NORMS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "none": lambda channels, size: [],
    "spectral": lambda channels, size: [],
    "batch": lambda channels, size: [nn.BatchNorm2d(channels)],
    "instance": lambda channels, size: [nn.InstanceNorm2d(channels, affine=True)],
    "layer": lambda channels, size: [nn.LayerNorm([channels, size, size])],
}


def dcgan(norm: str, width: int, size: int = 64, channels: int = 3) -> nn.Sequential:
    """DCGAN's critic: stride-2 convolutions down to 4x4, each but the first and the last with a norm."""
    wrap = nn.utils.parametrizations.spectral_norm if norm == "spectral" else lambda layer: layer
    layers: list[nn.Module] = [wrap(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
    size //= 2
    while size > 4:
        size //= 2
        layers.append(wrap(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=norm in ("none", "spectral"))))
        layers += [*NORMS[norm](2 * width, size), nn.LeakyReLU(0.2)]
        width *= 2
    return nn.Sequential(*layers, wrap(nn.Conv2d(width, 1, 4)))


def two_sided(grad: Tensor) -> Tensor:
    return 10 * (grad.flatten(1).norm(2, dim=1) - 1).square().mean()


def linear(grad: Tensor) -> Tensor:
    return 10 * grad.flatten(1).norm(2, dim=1).mean()


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


def ls_gan_pg_step(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Step]:
    """The loss-sensitive critic's step: hinge on pairs, and the norm of the gradient at real images."""

    def loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        return (1 + real_scores - fake_scores).relu().mean()

    def none() -> None:
        loss(critic(real), critic(fake)).backward()

    def usual() -> None:
        total = loss(critic(real), critic(fake))
        (total + linear(at(critic, real)[1])).backward()

    def best() -> None:
        scores, grad = at(critic, real)
        assign(critic, loss(scores, critic(fake)) + linear(grad))

    def ours() -> None:
        scores, penalty = gp.score_and_penalty(critic, real, kind="ls_gan_pg")
        (loss(scores, critic(fake)) + penalty).backward()

    return {"no penalty": none, "usual": usual, "best": best, "gpkernels": ours}


def wgan_gp_step(critic: nn.Module, real: Tensor, fake: Tensor) -> dict[str, Step]:
    eps = torch.rand(len(real), device=real.device)

    def mixed() -> Tensor:
        column = eps.view(-1, 1, 1, 1)
        return column * real + (1 - column) * fake

    def loss() -> Tensor:
        return critic(fake).mean() - critic(real).mean()

    def none() -> None:
        loss().backward()

    def usual() -> None:
        total = loss()
        (total + two_sided(at(critic, mixed())[1])).backward()

    def best() -> None:
        total = loss()
        assign(critic, total + two_sided(at(critic, torch.lerp(fake, real, eps.view(-1, 1, 1, 1)))[1]))

    def ours() -> None:
        (loss() + gp.gradient_penalty(critic, real, fake, eps=eps)).backward()

    return {"no penalty": none, "usual": usual, "best": best, "gpkernels": ours}


def assign(critic: nn.Module, loss: Tensor) -> None:
    parameters = list(critic.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.grad = grad


STEPS = {"penalty step": penalty_step, "LS-GAN-PG step": ls_gan_pg_step, "WGAN-GP step": wgan_gp_step}


@dataclass(frozen=True)
class Setting:
    step: str
    norm: str
    width: int
    batch: int = 64
    size: int = 64

    @property
    def name(self) -> str:
        return f"{self.step}, DCGAN-{self.size} {self.norm}, width {self.width}"

    def make(self, device: torch.device) -> tuple[nn.Module, dict[str, Step]]:
        torch.manual_seed(0)
        critic = dcgan(self.norm, self.width, self.size).to(device)
        real, fake = (torch.randn(self.batch, 3, self.size, self.size, device=device) for _ in range(2))
        return critic, STEPS[self.step](critic, real, fake)


SETTINGS = [
    *(Setting("penalty step", norm, 64) for norm in NORMS),
    *(Setting("penalty step", norm, 16) for norm in NORMS),
    *(Setting(step, norm, width) for step in list(STEPS)[1:] for width in (64, 16) for norm in ("none", "batch")),
]
QUICK = [Setting(step, norm, 16, 16, 32) for step in STEPS for norm in ("none", "batch")]


def differs(critic: nn.Module, variants: dict[str, Step]) -> str:
    """In what the variants' gradients differ by more than rounding; empty when in nothing. The running state of norms
    is put back before each, so that all see the same critic."""
    start = {name: value.clone() for name, value in critic.state_dict().items()}
    grads: dict[str, list[Tensor]] = {}
    for name in ("usual", "best", "gpkernels"):
        critic.load_state_dict(start)
        critic.zero_grad()
        variants[name]()
        grads[name] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in critic.parameters()]
    total = torch.stack([g.norm() for g in grads["usual"]]).norm()
    for name in ("best", "gpkernels"):
        for (key, _), a, b in zip(critic.named_parameters(), grads["usual"], grads[name], strict=True):
            error = (a - b).norm() / torch.maximum(a.norm(), 1e-3 * total)
            if not error < 1e-3:
                return f"{name}: the gradient of {key} differs by {error:.1e}"
    return ""


def measure(setting: Setting, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    critic, variants = setting.make(device)
    problem = differs(critic, variants)
    if problem:
        print(f"{setting.name}: {problem}, not timed")
        return []

    def cleared(step: Step) -> Step:
        def run() -> None:
            critic.zero_grad(set_to_none=True)
            step()

        return run

    variants = {name: cleared(step) for name, step in variants.items()}
    times = timing.interleaved(variants, device, rounds)
    base = times.get("no penalty", times["usual"]).median
    rows = []
    for name, taken in times.items():
        counted = counts.count(variants[name])
        critic.zero_grad(set_to_none=True)
        peak = counts.peak_bytes(variants[name], device)
        rows.append(
            {
                "case": setting.name,
                "batch": setting.batch,
                "variant": name,
                **taken.milliseconds(),
                "of_no_penalty": round(taken.median / base, 3) if "no penalty" in times else "",
                "speedup_over_usual": round(times["usual"].median / taken.median, 3),
                "speedup_over_best": round(times["best"].median / taken.median, 3),
                "ops": counted.ops,
                "conv_units": counted.convolutions,
                "mib_moved": round(counted.bytes / 2**20, 1),
                "peak_mib": round(peak / 2**20, 1),
            }
        )
    return rows


def main() -> None:
    options = parser("steps", __doc__, 9).parse_args()
    device = torch.device(options.device)
    settings, rounds = (QUICK, 3) if options.quick else (SETTINGS, options.rounds)
    about, rows = machine(device), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for setting in settings:
        if options.only not in setting.name:
            continue
        for row in measure(setting, device, rounds):
            rows.append({**row, **about})
            print(
                f"{row['case']:44} {row['variant']:10} {row['median_ms']:>9} ms {row['of_no_penalty']:>6} of none "
                f"{row['speedup_over_usual']:>6} x usual {row['speedup_over_best']:>6} x best {row['ops']:>4} ops "
                f"{row['conv_units']:>3} conv {row['mib_moved']:>8} MiB moved {row['peak_mib']:>7} MiB peak",
                flush=True,
            )
    if options.out and rows:
        save(options.out, rows)


if __name__ == "__main__":
    main()
