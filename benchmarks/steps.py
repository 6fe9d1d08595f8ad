"""`python -m benchmarks.steps`: a critic's penalty step and its whole training step, against autograd.

Variants compute the same and take turns. "usual" is the code one finds, "best" the fastest plain torch we know (one
forward shared by loss and penalty, gradients of the parameters alone), "no penalty" the same step without a penalty.
Before a time counts, the parameter gradients are compared. Counts do not depend on the machine: `ops` are the calls
that reach a device (views and allocations left out), `conv_units` the convolutions, forward or either gradient, and
`mib_moved` the bytes that these calls read and write. `peak_mib` is what a step adds to the memory of tensors.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from benchmarks import counts, timing
from benchmarks.critics import CRITICS
from benchmarks.machine import machine, parser, save
from benchmarks.problems import STEPS, Problem, Step


def freeze(critic: nn.Module) -> None:
    """Torch's spectral norm moves its vectors at every forward: variants with fewer would see other weights."""
    for module in critic.modules():
        if isinstance(module, _SpectralNorm):
            module.eval()


@dataclass(frozen=True)
class Setting:
    """A critic of `CRITICS`, its width in the units of its `build`. bfloat16 is autocast's: parameters stay float32.
    With channels_last so are the critic's weights and the images, for every variant."""

    step: str
    critic: str
    width: int
    batch: int = 64
    size: int = 64
    dtype: str = "float32"
    channels_last: bool = False

    @property
    def name(self) -> str:
        kind, _, norm = self.critic.partition(" ")
        layout = ", channels_last" if self.channels_last else ""
        return f"{self.step}, {kind}-{self.size}{norm and ' '}{norm}, width {self.width}{layout}"

    def make(self, device: torch.device) -> Problem:
        torch.manual_seed(0)
        row = CRITICS[self.critic]
        critic = row.build(self.width, self.size).to(device)
        if self.step != "penalty step":
            freeze(critic)
        real, fake = (torch.randn(self.batch, *row.shape(self.size), device=device) for _ in range(2))
        if self.channels_last:
            critic = critic.to(memory_format=torch.channels_last)
            real, fake = (x.contiguous(memory_format=torch.channels_last) for x in (real, fake))
        return STEPS[self.step](critic, real, fake)


NORMS = ("none", "spectral", "batch", "instance", "layer")

WHOLE = ("LS-GAN-PG step", "R1 step", "WGAN-GP step")

SETTINGS = [
    *(Setting("penalty step", f"DCGAN {norm}", width) for width in (64, 16) for norm in NORMS),
    *(Setting(step, f"DCGAN {norm}", width) for step in WHOLE for width in (64, 16) for norm in ("none", "batch")),
    *(
        Setting(step, f"DCGAN {norm}", width, channels_last=True)
        for step in ("penalty step", *WHOLE)
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
GRAPH_TOLERANCE = 3e-2  # a CUDA graph stays in the precision of its capture, TF32 as torch's convolutions


def differs(critic: nn.Module, variants: Mapping[str, Step], tolerance: float) -> str:
    """In what the variants' gradients differ from those of "usual" by more than rounding; empty when in nothing.

    Each parameter's by its norm, or a thousandth of the whole gradient's where that is larger; of bfloat16 the whole
    gradient alone. The running state of norms is put back before each, so that all see the same critic.
    """
    start = {name: value.clone() for name, value in critic.state_dict().items()}
    grads: dict[str, list[Tensor]] = {}
    for name in variants:
        if name.startswith("no penalty"):
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


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """In which results are compared: cuDNN's convolutions round float32 to 10 bits unless told otherwise."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


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
    with without_tf32():
        difference = differs(critic, own, TOLERANCES[setting.dtype])
    if difference:
        print(f"{setting.name}: {difference}, not timed")
        return []
    for name in [name for name in variants if name not in own]:
        tolerance = GRAPH_TOLERANCE if name.endswith("graphed") else PEER_TOLERANCE
        with without_tf32():
            difference = differs(critic, {"usual": variants["usual"], name: variants[name]}, tolerance)
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


def command(
    flags: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    settings: Iterable[Setting],
    quick: Iterable[Setting],
    peers: Peers | None = None,
    draw: Callable[[Path, list[dict[str, Any]]], None] | None = None,
) -> None:
    """A benchmark of settings, with these flags."""
    options = flags.parse_args(arguments)
    rows = run(quick if options.quick else settings, options, 3 if options.quick else options.rounds, peers)
    if draw is not None and options.picture and rows:
        draw(options.picture, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    command(parser("steps", __doc__, 9), arguments, SETTINGS, QUICK)


if __name__ == "__main__":
    main()
