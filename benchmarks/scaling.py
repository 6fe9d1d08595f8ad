"""`python -m benchmarks.scaling`: how the cost of a penalty step grows with batch, image size, width and depth, and
that of spectral norm with the number of layers.

A line is fitted to log(time) over log(axis) for each variant: its slope is the power with which time grows, 1 where it
is proportional; a slope below that is a fixed cost, of launches and Python, which the small end shows. --picture draws
times, lines and slopes.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import gpkernels as gp
from benchmarks import timing
from benchmarks.critics import CRITICS
from benchmarks.machine import machine, parser, save, save_picture
from benchmarks.problems import Step, penalty_step
from benchmarks.spectral import Modules, spiked
from benchmarks.spectral import differs as spectral_differs
from benchmarks.steps import TOLERANCES, differs, without_tf32

Variants = dict[str, Step]


class Differ(RuntimeError):
    """Variants that do not compute the same: there is nothing to time."""


def _checked(variants: Variants, difference: str) -> Variants:
    if difference:
        raise Differ(difference)
    return variants


Make = Callable[[int, torch.device], Variants]


def _penalty(critic: nn.Module, device: torch.device, *shape: int) -> Variants:
    real = torch.randn(shape, device=device)
    variants = penalty_step(critic.to(device), real, real).variants
    with without_tf32():
        return _checked(variants, differs(critic, variants, TOLERANCES["float32"]))


def _critic(name: str, width: int, size: int, batch: int, device: torch.device) -> Variants:
    row = CRITICS[name]
    return _penalty(row.build(width, size), device, batch, *row.shape(size))


def _deep(layers: int, device: torch.device) -> Variants:
    """3x3 convolutions of 32 channels at 16x16, a LeakyReLU after each."""
    blocks = [m for _ in range(layers) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.LeakyReLU(0.2))]
    return _penalty(nn.Sequential(nn.Conv2d(3, 32, 1), *blocks, nn.Conv2d(32, 1, 16)), device, 16, 3, 16, 16)


def _spectral(layers: int, device: torch.device) -> Variants:
    """3x3 convolutions of 64 channels, forward and backward of all weights."""
    plain = nn.ModuleList(spiked(nn.Conv2d(64, 64, 3)) for _ in range(layers)).to(device)
    ours = copy.deepcopy(plain)
    usual = [spectral_norm(layer) for layer in plain]
    handle = gp.spectral_norm_all(ours)
    ours.load_state_dict(plain.state_dict())
    grads = [torch.randn_like(layer.weight) for layer in usual]
    variants = {"usual": Modules(usual, grads), "gpkernels": Modules(list(ours), grads, handle)}
    return _checked(variants, spectral_differs(variants))


SERIES: dict[str, tuple[str, Sequence[int], Make]] = {
    "batch": ("DCGAN-32 none, width 16", (4, 16, 64, 256), lambda n, on: _critic("DCGAN none", 16, 32, n, on)),
    "batch, BN": ("DCGAN-32 batch, width 16", (4, 16, 64, 256), lambda n, on: _critic("DCGAN batch", 16, 32, n, on)),
    "image size": (
        "DCGAN none, width 16, batch 16",
        (16, 32, 64, 128),
        lambda n, on: _critic("DCGAN none", 16, n, 16, on),
    ),
    "width": ("DCGAN-32 none, batch 16", (8, 16, 32, 64, 128), lambda n, on: _critic("DCGAN none", n, 32, 16, on)),
    "depth": ("3x3 convolutions, 32 channels, batch 16", (2, 4, 8, 16, 32), _deep),
    "layers": ("spectral norm of 3x3 convolutions, 64 channels", (2, 4, 8, 16, 32, 64), _spectral),
}
QUICK = {name: (what, axis[:2], make) for name, (what, axis, make) in SERIES.items()}


def slope(axis: Sequence[float], times: Sequence[float]) -> tuple[float, float]:
    """Of the line through (log axis, log time) by least squares: slope and intercept."""
    fit = statistics.linear_regression([math.log(a) for a in axis], [math.log(t) for t in times])
    return fit.slope, fit.intercept


def rows_of(
    name: str, what: str, axis: Sequence[int], make: Make, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for n in axis:
        torch.manual_seed(0)
        times = timing.interleaved(make(n, device), device, rounds)
        found += [{"axis": name, "case": what, "n": n, "variant": v, **t.milliseconds()} for v, t in times.items()]
    for variant in dict.fromkeys(row["variant"] for row in found):
        of_variant = [row for row in found if row["variant"] == variant]
        power, _ = slope(axis, [row["median_ms"] for row in of_variant])
        for row in of_variant:
            row["slope"] = round(power, 3)
    return found


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, names, strict=False):
        of_axis = [row for row in rows if row["axis"] == name]
        for variant in dict.fromkeys(row["variant"] for row in of_axis):
            points = [(int(r["n"]), float(r["median_ms"])) for r in of_axis if r["variant"] == variant]
            power, base = slope(*zip(*points, strict=True))
            (marks,) = axes.loglog(*zip(*points, strict=True), "o", label=f"{variant}: ~ n^{power:.2f}")
            ends = [points[0][0], points[-1][0]]
            axes.loglog(ends, [math.exp(base) * n**power for n in ends], color=marks.get_color(), linewidth=1)
        axes.set_title(of_axis[0]["case"], fontsize=9)
        axes.set_xlabel(name)
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_picture(figure, path, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("scaling", __doc__, 7, picture=True).parse_args(arguments)
    rounds = 3 if options.quick else options.rounds
    device = torch.device(options.device)
    about, rows = machine(device), []
    for name, series in (QUICK if options.quick else SERIES).items():
        if options.only in name:
            rows += [{**row, **about} for row in rows_of(name, *series, device, rounds)]
            for row in (row for row in rows if row["axis"] == name):
                print(
                    f"{row['axis']:12} {row['n']:>4} {row['variant']:10} {row['median_ms']:>9} ms  ~ n^{row['slope']}"
                )
            if options.out:
                save(options.out, rows)
    if options.picture and rows:
        draw(options.picture, rows)


if __name__ == "__main__":
    main()
