"""`python -m benchmarks.ops`: the ops against plain torch, one CSV row a measurement, and a table to read.

"snippet" is the code one usually sees, "best" the fastest plain torch we know, "best, compiled" that under
torch.compile, where it can be compiled as a whole. A time is reported only for a case whose results agree. Bandwidth
counts the bytes that the computation must move at least, and is set against that of `x.clone()`, measured in the same
rounds; `launches` are a GPU's, with the Triton backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import cases, roofline, timing
from benchmarks.machine import machine, parser, save


def agrees(case: cases.Case, x: torch.Tensor) -> bool:
    for got, wanted in case.agree(x):
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        if not error <= case.tolerance:
            print(f"{case.name}: results differ by {error:.1e}, not timed")
            return False
    return True


def compiled(variant: cases.Variant, name: str) -> dict[str, cases.Variant]:
    """The variant under torch.compile; nothing where that breaks it into parts, which is said."""
    torch._dynamo.reset()
    whole = torch.compile(variant, fullgraph=True)
    try:
        whole()
    except Exception as error:  # whatever a compiler raises
        print(f"{name}: not compiled as a whole: {type(error).__name__}")
        return {}
    return {"best, compiled": whole}


def run_case(
    case: cases.Case, shape: tuple[int, ...], device: torch.device, rounds: int, compile: bool
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    if not agrees(case, x):
        return []
    variants = {"copy": x.clone, **case.make(x)}
    if compile:
        variants |= compiled(variants["best"], case.name)
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
                "launches": case.costs[name].launches if name in case.costs else "",
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
                    "launches": "",
                    "speedup_over_best": round(times["plain Function"].median / taken.median, 3),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("ops", __doc__, 25, picture=True).parse_args(arguments)
    device = torch.device(options.device)
    about = machine(device)
    rounds, shapes = (5, cases.SHAPES[:1]) if options.quick else (options.rounds, cases.SHAPES)
    chosen = [case for case in cases.CASES if options.only in case.name]
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]]) -> None:
        for row in found:
            rows.append({**row, **about})
            print(
                f"{row['case']:42} {row['shape']:13} {row['variant']:22} {row['median_us']:>10} us "
                f"{row['gb_per_s']:>8} GB/s "
                f"{row['of_copy']:>6} of copy {row['launches']:>3} launches {row['speedup_over_best']:>7} x best",
                flush=True,
            )
        if options.out:
            save(options.out, rows)

    for shape in shapes:
        for case in chosen:
            keep(run_case(case, shape, device, rounds, not options.quick))
    keep(run_overhead(device, rounds))
    if options.picture and not options.only:
        roofline.draw_all(options.picture, roofline.panels([{k: str(v) for k, v in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
