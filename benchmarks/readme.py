"""`python -m benchmarks.readme`: writes the tables of README.md and benchmarks/README.md from the newest results."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks import labels, presets
from benchmarks.experiments import Row, markdown

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks/README.md")
VARIANTS = ("no penalty", "usual", "best", "gpkernels")


def results(pattern: str) -> list[Row]:
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
        "medians in ms, with freed memory managed by the C library, as it is by itself, and kept in the process. "
        'Legacy is `torch.nn.utils.spectral_norm`, "torch" its parametrization.',
        "",
        "| critic | layers | MiB | managed: torch | legacy | gpkernels | over torch, legacy "
        "| kept: torch | legacy | gpkernels | over torch, legacy | ops: torch, legacy, ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    variants = ("torch", "legacy", "gpkernels")
    cases: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["memory"], row["variant"]] = row
    for name, found in cases.items():
        cells = [name, found["kept", "torch"]["layers"], found["kept", "torch"]["weights_mib"]]
        for memory in ("managed", "kept"):
            if (memory, "torch") not in found:  # a GPU has one kind of memory
                cells += [""] * 4
                continue
            times = [float(found[memory, variant]["median_ms"]) for variant in variants]
            cells += [f"{time:.2f}" for time in times]
            cells.append(", ".join(f"{time / times[-1]:.1f}x" for time in times[:-1]))
        cells.append(", ".join(found["kept", variant]["ops"] for variant in variants))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def where(row: Row) -> str:
    return f"{row['machine']}, torch {row['torch']}, {row['date']}"


def by_case(rows: Iterable[Row], column: str) -> dict[str, dict[str, str]]:
    """{case and batch: {variant: cell}}"""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(f"{row['case']}, batch {row['batch']}", {})[row["variant"]] = row[column]
    return found


def peers_table(pattern: str = "*-peers-*.csv") -> str:
    """How many times as fast as the usual code each variant is; a dash where a peer cannot do a critic."""
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    found = dict.fromkeys(row["variant"] for row in rows)
    variants = [name for name in found if name not in ("no penalty", "usual")]
    lines = [
        [case, *(f"{float(cells[v]):.2f}x" if v in cells else "-" for v in variants)]
        for case, cells in by_case(rows, "speedup_over_usual").items()
    ]
    return f"{where(rows[0])}, float32.\n\n" + markdown(["step", *variants], lines)


def ablation_table(pattern: str = "*-ablation-*.csv") -> str:
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    order = ["usual", "best", "activations", "convolutions", "norms", "first layers", "gpkernels"]
    times, ops, conv = (by_case(rows, column) for column in ("of_no_penalty", "ops", "conv_units"))
    lines = [
        [
            case.partition(", ")[2],
            *(f"{float(cells[name]):.2f}" for name in order),
            *(
                f"{counts[case]['no penalty']}, {counts[case]['best']}, {counts[case]['gpkernels']}"
                for counts in (ops, conv)
            ),
        ]
        for case, cells in times.items()
    ]
    header = ["LS-GAN-PG step", *order, "ops: no penalty, best, ours", "conv: no penalty, best, ours"]
    return f"{where(rows[0])}, float32; a time of 1 is the step without a penalty.\n\n" + markdown(header, lines)


def matrix_table(pattern: str = "*-matrix-*.csv") -> str:
    """Of every critic over all sizes, batches and penalties: the least, the median and the most."""
    rows = [row for row in results(pattern) if row["variant"] == "gpkernels"]
    if not rows:
        return "Not yet measured."
    groups: dict[str, list[Row]] = {}
    for row in rows:
        kind, _, norm = row["case"].partition(", ")[2].partition(", ")[0].partition(" ")
        name = f"{kind.rpartition('-')[0]} {norm}".strip() + ("" if row["dtype"] == "float32" else f", {row['dtype']}")
        groups.setdefault(name, []).append(row)

    def spread(of: list[Row], column: str) -> str:
        values = sorted(float(row[column]) for row in of)
        return f"{values[0]:.2f}, {statistics.median(values):.2f}, {values[-1]:.2f}"

    columns = ("speedup_over_usual", "speedup_over_best", "of_no_penalty")
    lines = [[name, str(len(of)), *(spread(of, column) for column in columns)] for name, of in groups.items()]
    header = ["critic", "cells", "over usual: least, median, most", "over best", "cost in steps without a penalty"]
    return f"{where(rows[0])}.\n\n" + markdown(header, lines)


def scaling_table(pattern: str = "*-scaling-*.csv") -> str:
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["axis"], row["case"]), {}).setdefault(row["variant"], []).append(row)
    lines = []
    for (axis, case), variants in found.items():
        of = variants["usual"]
        gains = [float(u["median_ms"]) / float(o["median_ms"]) for u, o in zip(of, variants["gpkernels"], strict=True)]
        slopes = [f"{float(variants[name][0]['slope']):.2f}" for name in ("usual", "gpkernels")]
        lines.append([axis, case, f"{of[0]['n']} to {of[-1]['n']}", *slopes, f"{gains[0]:.2f}x to {gains[-1]:.2f}x"])
    header = ["axis", "case", "range", "slope, usual", "slope, ours", "ours over usual, from end to end"]
    return f"{where(rows[0])}.\n\n" + markdown(header, lines)


def ops_table(pattern: str = "*-ops-*.csv") -> str:
    """The ops at the large shape, against the best plain torch."""
    rows = [row for row in results(pattern) if row["gb_per_s"] and row["variant"] != "copy"]
    if not rows:
        return "Not yet measured."
    largest = rows[-1]["shape"]
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["shape"] == largest:
            found.setdefault(row["case"], {})[row["variant"].partition(" (")[0]] = row
    lines = []
    for case, variants in found.items():
        ours, best = variants["gpkernels"], variants["best"]
        compiled = variants.get("best, compiled")
        times = [f"{float(row['median_us']):.0f}" for row in (variants["snippet"], best)]
        times.append(f"{float(compiled['median_us']):.0f}" if compiled else "-")
        lines.append(
            [
                case,
                *times,
                f"{float(ours['median_us']):.0f}",
                f"{float(ours['speedup_over_best']):.2f}x",
                ours["of_copy"],
            ]
        )
    header = [
        "op",
        "snippet, us",
        "best, us",
        "best compiled, us",
        "gpkernels, us",
        "over best",
        "of the copy's bandwidth",
    ]
    return f"{where(rows[0])}, {largest} float32.\n\n" + markdown(header, lines)


def trainer_table(pattern: str = "*-trainer-*.csv") -> str:
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    shares = ("data", "critic", "penalty", "generator", "average")
    lines = [
        [
            row["preset"],
            row["penalty_kind"],
            f"{row['image_size']} px, {row['batch']}, {row['critic_steps']}",
            row["images_per_s"],
            row["loader_images_per_s"],
            *(f"{float(row[f'{share}_share']):.1%}" for share in shares),
            row["over_no_penalty"],
        ]
        for row in rows
    ]
    header = ["preset", "penalty", "image, batch, critic steps", "images/s", "of the loader alone", *shares]
    header.append("step over one without penalty")
    return f"{where(rows[0])}.\n\n" + markdown(header, lines)


def processes_table(pattern: str = "*-processes-*.csv") -> str:
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    first = rows[0]
    lines = [[row["processes"], row["added_ms"], f"{float(row['efficiency']):.1%}"] for row in rows]
    return (
        f"A model, not a measurement: {first['preset']}, {first['image_size']} pixels, {first['images_a_process']} "
        f"images a process. Counted: {first['exchanged_mb']} MB in {first['messages']} messages a step. Measured: "
        f"{first['measured_step_ms']} ms a step of one process ({where(first)}). Assumed: {first['assumed_gb_per_s']} "
        f"GB/s, {first['assumed_hop_us']} us a hop, nothing overlapped.\n\n"
        + markdown(["processes", "added to a step, ms", "efficiency at this step time"], lines)
    )


def presets_table(pattern: str = "*-presets-*.csv") -> str:
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    first = rows[0]
    return (
        f"{where(first)}; {first['data']}, width {first['width']}, epochs: {first['epochs']}, seed {first['seed']}, "
        f"{first['samples']} samples against as many {first['measured_on']} images.\n\n{presets.table(rows)}\n\n"
        f"{presets.reading(rows)}"
    )


def labels_table(pattern: str = "*-labels-*.csv") -> str:
    rows = results(pattern)
    if not rows:
        return "Not yet measured."
    first = rows[0]
    return (
        f"{where(first)}; {first['data']}, {first['labels']} labels, {first['validation']} validation images, width "
        f"{first['width']}.\n\n{labels.table(rows)}"
    )


TABLES = {
    "steps": steps_table,
    "spectral": spectral_table,
    "peers": peers_table,
    "ablation": ablation_table,
    "matrix": matrix_table,
    "scaling": scaling_table,
    "ops": ops_table,
    "trainer": trainer_table,
    "processes": processes_table,
    "presets": presets_table,
    "labels": labels_table,
}


def with_tables(text: str) -> str:
    """A page's text with every table between its markers written anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.S)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
