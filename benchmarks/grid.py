"""`python -m benchmarks.grid`: every penalty kind x form x loss, with and without spectral norm, trained small.

A cell is the sliced Wasserstein distance (swd) of its samples from real images over that of the untrained generator:
1 is no better than at initialisation. Real images are held out where the data has such. Cells that diverge are recorded
and drawn as such. All have one seed, one learning rate, one penalty weight and few steps, so the picture shows what
works at once with everything else the same, not what works best. ls_gan_pg penalises pixel by pixel, as its public code
does, the others by sample; r1, r2 and r1+r2 have their factor 1/2 in the form "squared". cls-gan needs data with
labels, and trains the nets of its kind.

Stopped and started again it keeps the finished cells. `--only` takes cells whose name, such as
"hinge / coupled one_sided / spectral norm", matches a regular expression; `--reduced` the published form of each kind,
and none.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import experiments
from benchmarks.experiments import Judge, Row, number
from benchmarks.machine import machine
from gpkernels.kinds import KINDS
from gpkernels.ops.grad_penalty.penalties import PENALTIES
from gpkernels.training import Learner, TrainConfig, disk
from gpkernels.training.config import LOSSES, PENALTY_KINDS
from gpkernels.training.data import ImageSet

NEEDS_LABELS = "cls-gan"
OF_LOSS: dict[str, dict[str, Any]] = {
    "gls-gan": {"slope": 0.01},
    NEEDS_LABELS: {"condition": "classes", "gamma": 1.0, "margin": 8e-4},
}
"""What a loss needs beside its name, as its preset has it."""
QUICK_LOSSES = ("wasserstein", "ls-gan")
QUICK_PENALTIES = ("none", "coupled two_sided", "r1 squared")


class Penalty(NamedTuple):
    kind: str
    form: str  # empty for kind "none"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.form}".strip()

    @property
    def settings(self) -> dict[str, Any]:
        """The kind's usual form is left to the kind, which gives it its factor."""
        usual = not self.form or self.form == usual_form(self.kind)
        return {"penalty": self.kind, "penalty_form": None if usual else self.form}


def usual_form(kind: str) -> str:
    return KINDS[kind.partition("+")[0]].form


PENALTIES_TRIED = (
    Penalty("none", ""),
    *(Penalty(kind, form) for kind in PENALTY_KINDS if kind != "none" for form in PENALTIES),
)
REDUCED = ("none", "coupled one_sided", *(f"{kind} {usual_form(kind)}" for kind in KINDS))


class Cell(NamedTuple):
    loss: str
    penalty: Penalty
    spectral_norm: bool

    @property
    def name(self) -> str:
        return f"{self.loss} / {self.penalty.name} / {'spectral norm' if self.spectral_norm else 'no spectral norm'}"

    def config(self, base: TrainConfig) -> TrainConfig:
        settings = {**OF_LOSS.get(self.loss, {}), **self.penalty.settings}
        return dataclasses.replace(base, loss=self.loss, spectral_norm=self.spectral_norm, **settings)


class Task(NamedTuple):
    cell: Cell
    base: TrainConfig
    samples: int


@functools.lru_cache(maxsize=1)
def judge(base: TrainConfig, samples: int) -> Judge:
    return Judge(experiments.load(base), {"swd": samples})


@functools.lru_cache
def initial_swd(base: TrainConfig, condition: str, samples: int) -> float:
    """Of the untrained generator, which depends on seed and condition alone."""
    config = dataclasses.replace(base, condition=condition)
    return swd(Learner(config, experiments.load(base)), base, samples)


def swd(learner: Learner, base: TrainConfig, samples: int) -> float:
    return judge(base, samples)(experiments.sampler(learner), ["swd"])["swd"].value


def train(task: Task) -> dict[str, Any]:
    """A cell's row, after training it from the beginning."""
    cell, base, samples = task
    started = time.perf_counter()
    config = cell.config(base)
    learner = Learner(config, experiments.load(base))
    status = "trained"
    while learner.step < learner.total_steps and status == "trained":
        if bad := experiments.not_finite(learner.train_step()):
            status = f"diverged: {bad} at step {learner.step}"
    if status == "trained" and not all(value.isfinite().all() for value in learner.ema.state_dict().values()):
        status = "diverged: weights that are not finite after the last step"
    initial = initial_swd(base, config.condition, samples)
    value = swd(learner, base, samples) if status == "trained" else ""
    return {
        "loss": cell.loss,
        "penalty": cell.penalty.kind,
        "form": cell.penalty.form,
        "spectral_norm": cell.spectral_norm,
        "status": status,
        "swd": value,
        "swd_initial": initial,
        "of_initial": "" if value == "" else value / initial,
        "seconds": round(time.perf_counter() - started, 2),
    }


def cell_of(row: Row) -> Cell:
    return Cell(row["loss"], Penalty(row["penalty"], row["form"]), row["spectral_norm"] == "True")


def cells(options: argparse.Namespace, images: ImageSet) -> list[Cell]:
    chosen = [name for name in LOSSES if name != NEEDS_LABELS or images.labels is not None]
    names = [penalty.name for penalty in PENALTIES_TRIED]
    if options.quick:
        chosen, names = list(QUICK_LOSSES), list(QUICK_PENALTIES)
    elif options.reduced:
        names = list(REDUCED)
    found = [
        Cell(loss, penalty, spectral)
        for loss in chosen
        for penalty in PENALTIES_TRIED
        if penalty.name in names
        for spectral in (False, True)
    ]
    return [cell for cell in found if re.search(options.only, cell.name)]


def seconds_a_cell(task: Task) -> float:
    """An estimate: a few steps of a cell with a penalty, and one measurement."""
    cell = Cell("wasserstein", Penalty("coupled", "two_sided"), True)
    learner = Learner(cell.config(task.base), experiments.load(task.base))
    learner.train_step()
    started = time.perf_counter()
    for _ in range(5):
        learner.train_step()
    steps = (time.perf_counter() - started) / 5 * learner.total_steps
    swd(learner, task.base, task.samples)  # features of the real images
    started = time.perf_counter()
    swd(learner, task.base, task.samples)
    return steps + time.perf_counter() - started


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """A panel with and one without spectral norm: rows losses, columns penalties, crosses for what diverged."""
    from matplotlib.figure import Figure

    found = {cell_of(row): row for row in rows}
    losses = [name for name in LOSSES if any(cell.loss == name for cell in found)]
    columns = [penalty for penalty in PENALTIES_TRIED if any(cell.penalty == penalty for cell in found)]
    shares = [number(row["of_initial"]) for row in rows if row["of_initial"]]
    low, high = min(shares, default=0.0), min(max([1.0, *shares]), 1.5)
    figure = Figure(figsize=(4 + 1.1 * len(columns), 3 + 0.4 * len(losses)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, spectral in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        values = [[math.nan] * len(columns) for _ in losses]
        for y, loss in enumerate(losses):
            for x, penalty in enumerate(columns):
                row = found.get(Cell(loss, penalty, spectral))
                if row is None:
                    continue
                values[y][x] = value = number(row["of_initial"])
                style: dict[str, Any] = {"color": "white" if value < (low + high) / 2 else "black", "fontsize": 7}
                if row["status"] != "trained":
                    style = {"color": "red", "fontsize": 12}
                text = f"{value:.2f}" if row["status"] == "trained" else "x"
                axes.text(x, y, text, ha="center", va="center", **style)
        image = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_facecolor("lightgrey")
        axes.set_title("with spectral norm" if spectral else "without spectral norm", fontsize=10)
        axes.set_xticks(range(len(columns)), [penalty.name for penalty in columns], rotation=90, fontsize=8)
        axes.set_yticks(range(len(losses)), losses, fontsize=8)
    label = "swd over that at initialisation\nlower is better, red x: diverged"
    figure.colorbar(image, ax=figure.axes, label=label)
    path.parent.mkdir(parents=True, exist_ok=True)
    disk.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def summary(rows: Sequence[Row]) -> str:
    """What the columns do over all losses."""
    lines = [f"{'penalty':28} {'spectral norm':14} {'median':>7} {'best':>6} {'worst':>6} diverged"]
    groups: dict[tuple[Penalty, bool], list[Row]] = {}
    for row in rows:
        cell = cell_of(row)
        groups.setdefault((cell.penalty, cell.spectral_norm), []).append(row)
    for (penalty, spectral), group in groups.items():
        values = sorted(number(row["of_initial"]) for row in group if row["status"] == "trained")
        shown = f"{values[len(values) // 2]:7.2f} {values[0]:6.2f} {values[-1]:6.2f}" if values else " " * 21
        lines.append(f"{penalty.name:28} {'yes' if spectral else 'no':14} {shown} {len(group) - len(values)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="lfw-mini", help="as of gpkernels train")
    parser.add_argument("--steps", type=int, default=300, help="of each cell")
    parser.add_argument("--width", type=int, default=8, help="of both nets")
    parser.add_argument("--samples", type=int, default=1000, help="how many each measurement draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reduced", action="store_true", help="the usual form of each kind, and one-sided WGAN-GP")
    parser.add_argument("--quick", action="store_true", help="two losses, three penalties")
    parser.add_argument("--only", default="", help="only cells whose name matches this regular expression")
    parser.add_argument("--jobs", type=int, default=experiments.cores(), help="processes")
    parser.add_argument("--runs", type=Path, default=Path("runs/grid"), help="where cells are kept, to go on with")
    parser.add_argument("--out", type=Path, help="results, without .csv and .png (default: in --runs)")
    options = parser.parse_args(arguments)
    base = TrainConfig(
        preset="ls-gan-pg-mini",
        data=options.data,
        image_size=32,
        ngf=options.width,
        ndf=options.width,
        batch_size=16,
        lr=5e-4,
        ema=0.998,
        flip=False,
        steps=options.steps,
        seed=options.seed,
        device="cpu",
    )
    images = experiments.load(base)
    key = experiments.digest({**base.to_dict(), "samples": options.samples})
    store = options.runs / f"{images.name}-{key}" / "cells.csv"
    wanted = cells(options, images)
    if not wanted:
        parser.error(f"--only: wanted an expression that a cell's name matches, got {options.only!r}")
    rows: list[Any] = list(experiments.read(store))
    finished = {cell_of(row) for row in rows}
    tasks = [Task(cell, base, options.samples) for cell in wanted if cell not in finished]
    print(f"{len(wanted)} cells, {len(wanted) - len(tasks)} finished before", flush=True)
    if tasks:
        minutes = seconds_a_cell(tasks[0]) * len(tasks) / min(options.jobs, len(tasks)) / 60
        print(f"{len(tasks)} to train, {options.jobs} at a time: about {minutes:.1f} minutes", flush=True)
    for done, row in enumerate(experiments.outcomes(train, tasks, options.jobs), 1):
        rows.append(row)
        experiments.write(store, rows)
        shown = f"swd {row['swd']:.3f}, {row['of_initial']:.2f} of initial" if row["swd"] != "" else row["status"]
        cell = cell_of({key: str(value) for key, value in row.items()})
        print(f"{done}/{len(tasks)}  {cell.name}: {shown}", flush=True)
    about = {"data": images.name, "measured_on": judge(base, options.samples).part, "samples": options.samples}
    about |= {"width": options.width, "steps": options.steps, "seed": options.seed, **machine(torch.device("cpu"))}
    kept = {cell_of(row): row for row in experiments.read(store)}
    out = options.out or store.parent / experiments.results_name("grid", images)
    csv_file, png_file = (out.with_name(out.name + ending) for ending in (".csv", ".png"))
    experiments.write(csv_file, [{**kept[cell], **about} for cell in wanted])
    found = experiments.read(csv_file)
    print(summary(found))
    draw(png_file, found, f"{images.name}, 32x32, width {options.width}, {options.steps} steps of 16 images")
    print(f"{csv_file}\n{png_file}")


if __name__ == "__main__":
    main()
