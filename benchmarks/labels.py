"""`python -m benchmarks.labels`: what images without a label add to a classifier with few labels.

Preset cls-gan-semi, and its critic alone: the same net, first weights, optimizer and labelled images of each batch, but
nothing else than cross-entropy on them. The classification error is that on held-out images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from benchmarks import experiments
from benchmarks.machine import machine
from gpkernels.training import Learner, TrainConfig, from_preset

ALONE, SEMI = "labels alone", "cls-gan-semi"


class Task(NamedTuple):
    model: str
    base: TrainConfig
    config: TrainConfig
    measurements: int


def supervised_step(learner: Learner) -> None:
    """An update of the critic by cross-entropy on the labelled images of the step's batch."""
    config, images = learner.config, learner.images
    real = images.batch(config, learner.step, torch.Generator().manual_seed(learner.step))
    y, known = images.batch_labels(config, learner.step)
    loss = F.cross_entropy(learner.critic.logits(real[known].to(learner.device)), y[known].to(learner.device))
    optimizer = learner.optimizers["critic"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    learner.step += 1


def train(task: Task) -> list[dict[str, Any]]:
    """A row each time the error is measured."""
    started, rows = time.perf_counter(), []
    learner = Learner(task.config, experiments.load(task.base))
    step = learner.train_step if task.model == SEMI else lambda: supervised_step(learner)
    every = max(1, learner.total_steps // task.measurements)
    while learner.step < learner.total_steps:
        step()
        if learner.step % every == 0 or learner.step == learner.total_steps:
            row = {"model": task.model, "seed": task.config.seed, "step": learner.step}
            row["classification_error"] = learner.classification_error()
            rows.append({**row, "seconds": round(time.perf_counter() - started, 1)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labels", description=__doc__)
    parser.add_argument("--data", default="fashion-mnist", help="as of gpkernels train, with held-out images")
    parser.add_argument("--labels", type=int, default=400)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--width", type=int, default=16, help="of both nets")
    parser.add_argument("--batch", type=int, default=64, help="images a step, half of them with a label")
    parser.add_argument("--jobs", type=int, default=experiments.cores(), help="processes")
    parser.add_argument("--out", type=Path, help="the CSV file of results")
    options = parser.parse_args(arguments)
    base = TrainConfig(data=options.data, image_size=32)
    settings = {"data": options.data, "image_size": 32, "labels": options.labels, "steps": options.steps}
    settings |= {"ngf": options.width, "ndf": options.width, "batch_size": options.batch, "device": "cpu"}
    configs = [from_preset(SEMI, {**settings, "seed": seed}) for seed in range(options.seeds)]
    tasks = [Task(model, base, config, 8) for config in configs for model in (ALONE, SEMI)]
    rows = [row for found in experiments.outcomes(train, tasks, options.jobs) for row in found]
    for model in (ALONE, SEMI):
        last = [row["classification_error"] for row in rows if (row["model"], row["step"]) == (model, options.steps)]
        print(f"{model:14} {statistics.mean(last):.4f}, from {min(last):.4f} to {max(last):.4f} over {len(last)} seeds")
    about = {"data": experiments.load(base).name, "labels": options.labels, "width": options.width}
    out = options.out or Path("runs") / experiments.results_name("labels", experiments.load(base))
    out = out.with_name(out.name.removesuffix(".csv") + ".csv")
    experiments.write(out, [{**row, **about, **machine(torch.device("cpu"))} for row in rows])
    print(out)


if __name__ == "__main__":
    main()
