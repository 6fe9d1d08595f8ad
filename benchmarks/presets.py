"""`python -m benchmarks.presets`: every preset trained a little on the same images, measured before and after.

Each keeps its own loss, penalty, condition, optimizer, batches, critic steps and kind of nets; common to all are
images of 32x32, the width of the nets, and one pass or more over the images, counted in images that the critic sees. So
the table shows that each learns, and how far a short run on narrow nets takes it: not which is best. Samples are the
averaged generator's, measured against images that were held out where the data has such; presets with a condition go
through the classes in turn. Stopped and started again it keeps the finished presets.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import experiments
from benchmarks.experiments import Judge, Row, markdown, number
from benchmarks.machine import machine
from gpkernels.training import PRESETS, Learner, TrainConfig, from_preset


class Task(NamedTuple):
    name: str
    base: TrainConfig  # what loads the images
    settings: dict[str, Any]
    samples: dict[str, int]


_judges: dict[str, Judge] = {}


def judge(task: Task) -> Judge:
    key = f"{task.base.data} {task.samples}"
    if key not in _judges:
        _judges[key] = Judge(experiments.load(task.base), task.samples)
    return _judges[key]


def train(task: Task) -> dict[str, Any]:
    """A preset's row."""
    started = time.perf_counter()
    config = from_preset(task.name, task.settings)
    learner = Learner(config, experiments.load(task.base))

    def measured() -> dict[str, Any]:
        return {name: result.value for name, result in judge(task)(experiments.sampler(learner), task.samples).items()}

    before, status = measured(), "trained"
    while learner.step < learner.total_steps and status == "trained":
        if bad := experiments.not_finite(learner.train_step()):
            status = f"diverged: {bad} at step {learner.step}"
    after = measured() if status == "trained" else dict.fromkeys(before, "")
    row: dict[str, Any] = {"preset": task.name, "status": status, "steps": learner.step}
    for name in before:
        row |= {f"{name}_before": before[name], f"{name}_after": after[name]}
    error = learner.classification_error()
    row["classification_error"] = "" if error is None else error
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def metrics_of(rows: Sequence[Row]) -> list[str]:
    return [name.removesuffix("_before") for name in rows[0] if name.endswith("_before")]


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    names = metrics_of(rows)
    lines = []
    for row in rows:
        cells = [
            f"{number(row[f'{name}_before']):.3f}, {number(row[f'{name}_after']):.3f}"
            if row["status"] == "trained"
            else row["status"]
            for name in names
        ]
        wrong = row["classification_error"]
        lines.append([row["preset"], row["steps"], *cells, f"{float(wrong):.1%}" if wrong else "-"])
    return markdown(["preset", "steps", *(f"{name}: before, after" for name in names), "wrong classes"], lines)


def reading(rows: Sequence[Row]) -> str:
    """Which presets fall by how much, and which do not."""
    sentences = []
    for name in metrics_of(rows):
        of = {row["preset"]: number(row[f"{name}_after"]) / number(row[f"{name}_before"]) for row in rows}
        halved = [preset for preset, share in of.items() if share < 0.5]
        risen = [preset for preset, share in of.items() if not share < 1]  # or diverged
        but = f", not with {', '.join(risen)}" if risen else ""
        sentences.append(
            f"{name} falls with {len(of) - len(risen)} of {len(of)} presets, below half with {len(halved)}{but}."
        )
    return " ".join(sentences)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.presets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="as of gpkernels train, with labels (default: fashion-mnist)")
    parser.add_argument("--presets", default=",".join(PRESETS), help="names, comma-separated (default: all)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, help="only the first this many")
    parser.add_argument("--width", type=int, default=16, help="of both nets")
    parser.add_argument("--samples", type=int, default=1000, help="how many each measurement draws")
    parser.add_argument("--metrics", help="swd, or swd,kid_effnetlite0 (default: what is installed)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=experiments.cores(), help="processes")
    parser.add_argument("--runs", type=Path, default=Path("runs/presets"), help="where rows are kept, to go on with")
    parser.add_argument("--out", type=Path, help="the CSV file of results (default: in --runs)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    wanted = [name for name in options.presets.split(",") if name]
    data = options.data or "fashion-mnist"
    base = TrainConfig(data=data, image_size=32, max_images=options.images)
    images = experiments.load(base)
    metrics = options.metrics.split(",") if options.metrics else experiments.found_metrics()
    samples = dict.fromkeys(metrics, options.samples)
    settings = {"data": data, "image_size": 32, "max_images": options.images, "epochs": options.epochs, "flip": False}
    settings |= {"ngf": options.width, "ndf": options.width, "seed": options.seed, "device": options.device}
    tasks = [Task(name, base, settings, samples) for name in wanted]
    configs = {task.name: from_preset(task.name, settings).to_dict() for task in tasks}
    store = options.runs / f"{images.name}-{experiments.digest({**settings, **samples})}"
    files = {name: store / f"{name}-{experiments.digest(config)}.csv" for name, config in configs.items()}
    left = [task for task in tasks if not files[task.name].is_file()]
    print(f"{images.name}: {len(images.images)} images; {len(left)} of {len(tasks)} presets to train", flush=True)
    for row in experiments.outcomes(train, left, options.jobs):
        experiments.write(files[row["preset"]], [row])
        print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
    rows = [experiments.read(files[name])[0] for name in wanted]
    about = {"data": images.name, "measured_on": judge(tasks[0]).part, "samples": options.samples}
    about |= {"width": options.width, "epochs": options.epochs, "seed": options.seed, **machine(torch.device("cpu"))}
    out = options.out or store / f"{experiments.results_name('presets', images)}.csv"
    experiments.write(out, [{**row, **about} for row in rows])
    print(f"{table(rows)}\n{reading(rows)}\n{out}")


if __name__ == "__main__":
    main()
