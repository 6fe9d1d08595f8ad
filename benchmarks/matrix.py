"""`python -m benchmarks.matrix`: whole critic steps over the zoo: critics x penalties x image sizes x batches.

As `benchmarks.steps`, for many settings in fewer rounds; --picture draws how much faster than the usual code, and how
much slower than a step without a penalty, each cell is. bfloat16 is autocast's, with float32 penalties.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.critics import CRITICS
from benchmarks.machine import parser, save_picture
from benchmarks.problems import STEPS
from benchmarks.steps import Setting, command

PENALTIES = tuple(name for name in STEPS if name != "penalty step")
WIDTHS = {"MLP": 512}
"""In units of `CRITICS`; 16 for all others."""


def setting(step: str, critic: str, size: int, batch: int, dtype: str = "float32") -> Setting:
    return Setting(step, critic, WIDTHS.get(critic, 16), batch, size, dtype)


BATCHES = {"DCGAN none": (32, 64, 128), "DCGAN batch": (32, 64, 128), "MLP": (32, 64, 128), "SNGAN-ResNet": (32, 64)}
"""The sizes at which a critic gets batches of 4, 16 and 64; 64 at 32 pixels and 16 above elsewhere."""


def batches(critic: str, size: int) -> tuple[int, ...]:
    if size in BATCHES.get(critic, ()):
        return 4, 16, 64
    return (64,) if size == 32 else (16,)


SETTINGS = [
    setting(step, critic, size, batch)
    for critic, row in CRITICS.items()
    for size in row.sizes
    for batch in batches(critic, size)
    for step in PENALTIES
] + [
    setting(step, critic, 64, 16, "bfloat16")
    for critic in ("DCGAN none", "DCGAN batch", "SNGAN-ResNet")
    for step in PENALTIES
]
QUICK = [setting(step, critic, 32, 4) for step in PENALTIES[:1] for critic in CRITICS]


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Two panels: speed over the usual code, and cost in steps without a penalty."""
    from matplotlib.colors import Normalize, TwoSlopeNorm
    from matplotlib.figure import Figure

    ours = [row for row in rows if row["variant"] == "gpkernels"]
    across = list(dict.fromkeys(row["case"].partition(",")[0] for row in ours))
    down = list(dict.fromkeys(_critic(row) for row in ours))
    cells = {(_critic(row), row["case"].partition(",")[0]): row for row in ours}
    nets = [name.partition(", batch")[0] for name in down]
    borders = [y - 0.5 for y in range(1, len(down)) if nets[y] != nets[y - 1]]
    figure = Figure(figsize=(13, 1.5 + 0.22 * len(down)), layout="constrained")
    panels = (
        ("speedup_over_usual", "times as fast as the usual code", "RdYlGn", TwoSlopeNorm(1, 0.5, 3)),
        ("of_no_penalty", "cost, in steps without a penalty", "YlOrRd", Normalize(1, 4)),
    )
    for axes, (column, title, colours, norm) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        values = [
            [float(cells[key][column]) if (key := (name, step)) in cells else math.nan for step in across]
            for name in down
        ]
        axes.imshow(values, aspect="auto", cmap=colours, norm=norm)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axes.text(x, y, "-" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=7)
        axes.hlines(borders, -0.5, len(across) - 0.5, color="white", linewidth=2)
        axes.set_xticks(range(len(across)), across, fontsize=8)
        axes.set_yticks(range(len(down)), down, fontsize=7)
        axes.set_title(title, fontsize=10)
    save_picture(figure, path, rows)


def _critic(row: Mapping[str, Any]) -> str:
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{row['case'].partition(', ')[2]}, batch {row['batch']}{dtype}"


def main(arguments: Sequence[str] | None = None) -> None:
    command(parser("matrix", __doc__, 5, picture=True), arguments, SETTINGS, QUICK, draw=draw)


if __name__ == "__main__":
    main()
