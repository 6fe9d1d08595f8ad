"""`python -m benchmarks.roofline RESULTS.csv... --out picture.png`: how near the ops come to the memory's bandwidth.

One panel a file and shape, from the rows that `python -m benchmarks.ops --out` writes: the bytes that each case must
move at least, over the time that each variant took, beside the bandwidth of `x.clone()` in the same rounds. Without
matplotlib there is no picture.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, str]

GOALS = {"cpu": 0.80, "cuda": 0.85}
"""The share of the copy's bandwidth that a case is to reach."""

MARKERS = {"snippet": "x", "best": "o", "gpkernels": "D"}


Panels = list[tuple[str, dict[str, dict[str, Row]]]]


def panels(rows: Iterable[Row]) -> Panels:
    """(shape, rows by case and variant) of the rows with a bandwidth, each in the order of the rows."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["gb_per_s"]:
            variant = row["variant"].partition(" (")[0]
            found.setdefault(row["shape"], {}).setdefault(row["case"], {})[variant] = row
    return list(found.items())


def draw(axes: Any, shape: str, cases: dict[str, dict[str, Row]]) -> None:
    about = next(iter(cases.values()))["copy"]
    goal = GOALS["cpu" if about["machine"].endswith(" threads") else "cuda"]
    heights = range(len(cases))
    for style, label, share in (("-", "copy", 1.0), ("--", f"{goal:.0%} of copy", goal)):
        rates = [share * float(variants["copy"]["gb_per_s"]) for variants in cases.values()]
        lows, highs = ([height + step for height in heights] for step in (-0.4, 0.4))
        axes.vlines(rates, lows, highs, colors="black", linestyles=style, linewidth=1, label=label)
    for variant, marker in MARKERS.items():
        rates = [float(variants[variant]["gb_per_s"]) for variants in cases.values()]
        axes.plot(rates, heights, marker, label="best plain torch" if variant == "best" else variant)
    axes.set_title(
        f"{about['machine']}, {about['date']}, torch {about['torch']}: {shape} {about['dtype']}", fontsize=10
    )
    axes.set_yticks(heights, cases)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("GB/s")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def draw_all(out: Path, parts: Panels) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"no picture: {error}")
        return
    figure = Figure(figsize=(11, 4 * len(parts)), layout="constrained")
    for axes, (shape, cases) in zip(figure.subplots(len(parts), squeeze=False).flat, parts, strict=True):
        draw(axes, shape, cases)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    parts: Panels = []
    for path in options.results:
        with path.open(newline="") as file:
            parts += panels(csv.DictReader(file))
    if not parts:
        parser.error("results: wanted CSV files that `python -m benchmarks.ops --out` wrote, got none with a bandwidth")
    draw_all(options.out, parts)


if __name__ == "__main__":
    main()
