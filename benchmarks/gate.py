"""`python -m benchmarks.gate` (`make bench-check`): has a change made anything slower, or launch more?

Measures ours against the usual code in one run, and compares with the committed file: a ratio that lost more than 10 %,
in two measurements one after the other, fails, and so does any change of a count, more or less. Counts are the same on
every machine, ratios are not: those of another machine than the file's are only shown. --update writes the file anew;
commit it with the change that explains it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import counts, spectral, steps
from benchmarks.experiments import read
from benchmarks.machine import machine, save
from benchmarks.steps import Setting

FILE = Path(__file__).parent / "results/gate.csv"
LOSS = 0.10
SETTINGS = [
    Setting(step, critic, 16, 32)
    for step in ("penalty step", "LS-GAN-PG step", "WGAN-GP step", "R1 step")
    for critic in ("DCGAN none", "DCGAN batch", "DCGAN layer")
] + [Setting("LS-GAN-PG step", critic, 16, 8, 32) for critic in ("SNGAN-ResNet", "WGAN-GP-ResNet", "StyleGAN2")]
COUNTED = ("ops", "conv_units")

Row = dict[str, Any]


def of_steps(setting: Setting, rounds: int) -> Row:
    rows = {row["variant"]: row for row in steps.measure(setting, torch.device("cpu"), rounds)}
    return {"case": f"{setting.name}, batch {setting.batch}", "over_usual": rows["gpkernels"]["speedup_over_usual"]}


def of_spectral(name: str, rounds: int) -> Row:
    rows = spectral.measure(name, spectral.CRITICS[name], torch.device("cpu"), rounds, "kept")
    (ours,) = (row for row in rows if row["variant"] == "gpkernels")
    return {"case": f"spectral norm, {name}", "over_usual": ours["speedup"]}


MEASURED: dict[str, Callable[[int], Row]] = {
    **{f"{s.name}, batch {s.batch}": lambda rounds, s=s: of_steps(s, rounds) for s in SETTINGS},  # type: ignore[misc]
    "spectral norm, DCGAN-64": lambda rounds: of_spectral("DCGAN-64", rounds),
}


def counted(setting: Setting) -> dict[str, str]:
    """What the usual code and ours ask of a device in this setting: the same on every machine."""
    problem = setting.make(torch.device("cpu"))
    found: dict[str, str] = {}
    for name in ("usual", "gpkernels"):
        problem.critic.zero_grad(set_to_none=True)
        problem.variants[name]()  # the first call makes what is made once
        problem.critic.zero_grad(set_to_none=True)
        count = counts.count(problem.variants[name])
        found |= {f"ops_{name}": str(count.ops), f"conv_units_{name}": str(count.convolutions)}
    return found


COLUMNS = [f"{what}_{name}" for name in ("usual", "gpkernels") for what in COUNTED]


def all_counts() -> dict[str, dict[str, str]]:
    """By case; those without counts have empty cells."""
    found = {f"{s.name}, batch {s.batch}": counted(s) for s in SETTINGS}
    return {case: found.get(case, dict.fromkeys(COLUMNS, "")) for case in MEASURED}


def differences(committed: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each count that is not the committed one."""
    return [
        f"{case}: {column} is {cells[column]}, was {was[column]}"
        for case, cells in now.items()
        for was in [committed.get(case, dict.fromkeys(COLUMNS, "not counted"))]
        for column in COLUMNS
        if cells[column] != was[column]
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"write {FILE.name} anew")
    parser.add_argument("--counts", action="store_true", help="compare counts alone, which takes seconds")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    committed, now, about = {row["case"]: row for row in read(FILE)}, all_counts(), machine(torch.device("cpu"))
    problems = [] if options.update else differences(committed, now)
    rows = []
    for case, measure in {} if options.counts else MEASURED.items():
        ratio = measure(options.rounds)["over_usual"]
        was = committed.get(case, {})
        comparable = was.get("machine") == about["machine"] and not options.update
        if comparable and ratio < (1 - LOSS) * float(was["over_usual"]):
            ratio = max(ratio, measure(2 * options.rounds)["over_usual"])
            if ratio < (1 - LOSS) * float(was["over_usual"]):
                problems.append(f"{case}: {ratio:.2f}x the usual code, was {float(was['over_usual']):.2f}x")
        print(f"{case:60} {ratio:>6.2f}x usual  committed {was.get('over_usual') or 'none':>6}", flush=True)
        rows.append({"case": case, "over_usual": ratio, **now[case], **about})
    if options.update:
        save(FILE, rows)
    elif any(row["machine"] != about["machine"] for row in committed.values()):
        print(f"the committed ratios are of another machine than {about['machine']}: only counts are compared")
    print("\n".join(problems) or "no count changed, nothing slower")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
