"""`python -m benchmarks`: the ops against plain torch, one CSV row a measurement, and a table to read.

A time is reported only for a case whose results agree. Bandwidth counts the bytes that the computation must move at
least, and is set against that of `x.clone()`, measured in the same rounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, timing
from benchmarks.machine import machine, save


def agrees(case: cases.Case, x: torch.Tensor) -> bool:
    for got, wanted in case.agree(x):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        if not error <= case.tolerance:
            print(f"{case.name}: results differ by {error:.1e}, not timed")
            return False
    return True


def run_case(case: cases.Case, shape: tuple[int, ...], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    if not agrees(case, x):
        return []
    variants = {"copy": x.clone, **case.make(x)}
    times = timing.interleaved(variants, device, rounds)
    copy_rate = 2 * x.nbytes / times["copy"].median
    rows = []
    for name, taken in times.items():
        moved = (2 if name == "copy" else case.passes) * x.nbytes
        rows.append(
            {
                "case": case.name,
                "shape": "x".join(map(str, shape)),
                "dtype": str(x.dtype).removeprefix("torch."),
                "variant": f"gpkernels ({cases.backend_of(case, x)})" if name == "gpkernels" else name,
                "median_us": round(taken.median * 1e6, 2),
                "p20_us": round(taken.low * 1e6, 2),
                "p80_us": round(taken.high * 1e6, 2),
                "gb_per_s": round(moved / taken.median / 1e9, 2),
                "of_copy": round(moved / taken.median / copy_rate, 3),
                "speedup_over_best": round(times["best"].median / taken.median, 3) if name != "copy" else "",
            }
        )
    return rows


def run_overhead(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for op, variants in cases.overhead(device).items():
        times = timing.interleaved(variants, device, rounds)
        for name, taken in times.items():
            rows.append(
                {
                    "case": f"host overhead, {op}",
                    "shape": "4x3",
                    "dtype": "float32",
                    "variant": name,
                    "median_us": round(taken.median * 1e6, 2),
                    "p20_us": round(taken.low * 1e6, 2),
                    "p80_us": round(taken.high * 1e6, 2),
                    "gb_per_s": "",
                    "of_copy": "",
                    "speedup_over_best": round(times["plain Function"].median / taken.median, 3),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="few rounds, the small shape only")
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file")
    options = parser.parse_args()
    device = torch.device(options.device)
    rounds, shapes = (5, cases.SHAPES[:1]) if options.quick else (options.rounds, cases.SHAPES)
    rows = [row for shape in shapes for case in cases.CASES for row in run_case(case, shape, device, rounds)]
    rows += run_overhead(device, rounds)
    about = machine(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for row in rows:
        print(
            f"{row['case']:42} {row['shape']:13} {row['variant']:22} {row['median_us']:>10} us "
            f"{row['gb_per_s']:>8} GB/s {row['of_copy']:>6} of copy {row['speedup_over_best']:>7} x best"
        )
    if options.out:
        save(options.out, [{**row, **about} for row in rows])


main()
