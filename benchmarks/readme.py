"""`python -m benchmarks.readme`: writes the README's tables of numbers from the newest committed result files."""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
VARIANTS = ("no penalty", "usual", "best", "gpkernels")


def results(pattern: str) -> list[dict[str, str]]:
    """The rows of the newest result file of that name."""
    files = sorted((ROOT / "benchmarks/results").glob(pattern))
    if not files:
        return []
    with files[-1].open(newline="") as file:
        return list(csv.DictReader(file))


def steps_table(pattern: str = "*-steps-*.csv") -> str:
    """Times in multiples of the step without a penalty, or, for a penalty alone, of the usual code."""
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    cases: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["variant"]] = row
    first = rows[0]
    lines = [
        f"{first['machine']}, torch {first['torch']}, {first['date']}, float32, batch {first['batch']}. Medians; a "
        "time of 1 is the step without a penalty or, for a penalty alone, the usual code.",
        "",
        "| step | usual | best | gpkernels | over usual | over best | ops: usual, ours | conv: usual, ours "
        "| peak MiB: usual, ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, variants in cases.items():
        base = float(variants.get("no penalty", variants["usual"])["median_ms"])
        usual, ours = variants["usual"], variants["gpkernels"]
        cells = [
            name,
            *(f"{float(variants[v]['median_ms']) / base:.2f}" for v in VARIANTS[1:]),
            f"{float(ours['speedup_over_usual']):.2f}x",
            f"{float(ours['speedup_over_best']):.2f}x",
            *(f"{usual[key]}, {ours[key]}" for key in ("ops", "conv_units", "peak_mib")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spectral_table(pattern: str = "*-spectral-*.csv") -> str:
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    first = rows[0]
    lines = [
        f"{first['machine']}, torch {first['torch']}, {first['date']}, float32. Forward and backward of all layers, "
        "medians in ms, with freed memory kept in the process, and returned to the system as glibc does by itself.",
        "",
        "| critic | layers | MiB | kept: torch | gpkernels | over torch | returned: torch | gpkernels | over torch "
        "| ops: torch, ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["memory"], row["variant"]] = row
    for name, found in cases.items():
        cells = [name, found["kept", "torch"]["layers"], found["kept", "torch"]["weights_mib"]]
        for memory in ("kept", "returned"):
            usual, ours = (found.get((memory, variant)) for variant in ("torch", "gpkernels"))
            cells += (
                ["", "", ""]
                if ours is None or usual is None
                else [
                    f"{float(usual['median_ms']):.2f}",
                    f"{float(ours['median_ms']):.2f}",
                    f"{float(ours['speedup']):.1f}x",
                ]
            )
        cells.append(f"{found['kept', 'torch']['ops']}, {found['kept', 'gpkernels']['ops']}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"steps": steps_table, "spectral": spectral_table}


def with_tables(text: str) -> str:
    """The README's text with every table between its markers written anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.S)  # type: ignore[misc]
        assert found == 1, name
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
