"""`python -m benchmarks [PART ...]`: every measurement of the project, or some, into one folder.

Each part is a command of its own, `python -m benchmarks.PART --help`; together they take about half an hour on two
cores, and with --quick, which shows that they run and little more, under three minutes. --out DIR keeps
DATE-PART-MACHINE.csv, a row a measurement with machine, versions and commit, and pictures beside them.
"""

from __future__ import annotations

import argparse
import inspect
import time
from pathlib import Path

import torch

from benchmarks import ablation, convolution, graphs, matrix, ops, peers, scaling, spectral, steps, trainer
from benchmarks.machine import label, today

PARTS = {
    "ops": ops,
    "steps": steps,
    "spectral": spectral,
    "convolution": convolution,
    "graphs": graphs,
    "peers": peers,
    "ablation": ablation,
    "matrix": matrix,
    "scaling": scaling,
    "trainer": trainer,
}
PICTURES = ("ops", "ablation", "matrix", "scaling")


def main() -> None:
    about = {name: (inspect.getdoc(part) or "").partition(": ")[2].partition(".\n")[0] for name, part in PARTS.items()}
    lines = [f"  {name:12} {' '.join(text.split())}" for name, text in about.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n".join(["parts:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds")
    parser.add_argument("--out", type=Path, help="a folder for CSV files and pictures")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"PART: wanted some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    for name in options.parts or PARTS:
        if name == "convolution" and options.device != "cpu":
            continue
        if name == "graphs" and options.device == "cpu" and not options.parts:
            continue
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        arguments = ["--device", options.device, *["--quick"] * options.quick]
        if options.out:
            stem = options.out / f"{today()}-{name}-{label(torch.device(options.device))}"
            arguments += ["--out", f"{stem}.csv"]
            if name in PICTURES:
                arguments += ["--picture", f"{stem}.png"]
        PARTS[name].main(arguments)
        print(f"== {name} took {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
