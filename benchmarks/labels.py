"""`python -m benchmarks.labels`: what images without a label add to a classifier with few labels.

Three ways to train the same net, with the same first weights, optimizer and labelled images of each batch:

    labels alone    cross-entropy on the labelled images, nothing else
    self-training   that, and cross-entropy on the other images with the critic's own guesses where it is sure
    cls-gan-semi    the preset: self-training, and a generator whose images the critic is to tell from the real ones

Each trains with two settings: the first with the preset's learning rate and a third of it, the others with two
bounds for "sure". Setting and step are chosen by the error on images split off the training part, which no model trains
on; the error on the held-out images is then measured once a model and seed. Stopped and started again it keeps the
finished ones.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import experiments
from benchmarks.experiments import Row, markdown
from benchmarks.machine import machine
from gpkernels.losses import presume_labels
from gpkernels.training import Learner, TrainConfig, from_preset
from gpkernels.training.data import ImageSet

ALONE, SELF, SEMI = "labels alone", "self-training", "cls-gan-semi"
TRIED: Mapping[str, tuple[str, Sequence[float]]] = {
    ALONE: ("lr", (3e-4, 1e-3)),
    SELF: ("unlabelled_confidence", (0.8, 0.95)),
    SEMI: ("unlabelled_confidence", (0.8, 0.95)),
}
MEASUREMENTS = 20  # of the validation error, in equal distances


class Task(NamedTuple):
    """One model with one seed, and the settings that it tries."""

    model: str
    base: TrainConfig  # what loads the images
    config: TrainConfig
    validation: int

    @property
    def tried(self) -> list[TrainConfig]:
        name, values = TRIED[self.model]
        return [dataclasses.replace(self.config, **{name: value}) for value in values]


def split(images: ImageSet, count: int) -> ImageSet:
    """All but `count` of the images, with those as the held-out ones: the same whatever the seed of a run."""
    assert images.labels is not None
    order = torch.randperm(len(images.images), generator=torch.Generator().manual_seed(0)).numpy()
    training, validation = (
        ImageSet.from_arrays(images.images[part], images.labels[part], images.class_names, name=images.name)
        for part in (order[count:], order[:count])
    )
    return dataclasses.replace(training, shift=images.shift, load_held_out=lambda: validation)


def labelled_batch(learner: Learner) -> tuple[Tensor, Tensor, Tensor]:
    """The images of the step's batch, their labels, and which of these are known."""
    config, images = learner.config, learner.images
    real = images.batch(config, learner.step, torch.Generator().manual_seed(learner.step))
    y, known = images.batch_labels(config, learner.step)
    return real.to(learner.device), y.to(learner.device), known.to(learner.device)


def update(learner: Learner, loss: Tensor) -> None:
    optimizer = learner.optimizers["critic"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    learner.step += 1


def supervised_step(learner: Learner) -> None:
    """An update of the critic by cross-entropy on the labelled images of the step's batch."""
    real, y, known = labelled_batch(learner)
    update(learner, F.cross_entropy(learner.critic.logits(real[known]), y[known]))


def self_training_step(learner: Learner) -> None:
    """The same on the whole batch, with cls-gan-semi's guesses and weights, as if it had nothing but its gamma L."""
    config, (real, y, known) = learner.config, labelled_batch(learner)
    weight, confidence = config.unlabelled_weight, config.unlabelled_confidence
    y, weights = presume_labels(learner.critic.guess(real), y, known, weight=weight, confidence=confidence)
    update(learner, (weights * learner.critic(real, y)).mean())


STEPS: Mapping[str, Callable[[Learner], object]] = {
    ALONE: supervised_step,
    SELF: self_training_step,
    SEMI: lambda learner: learner.train_step(),
}


def train(task: Task) -> list[dict[str, Any]]:
    """A row for every setting and measurement; the chosen one has the error on the held-out images."""
    images = experiments.load(task.base)
    part, started = split(images, task.validation), time.perf_counter()
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {"validation_error": 2.0}
    for config in task.tried:
        learner = Learner(config, part)
        every = max(1, learner.total_steps // MEASUREMENTS)
        while learner.step < learner.total_steps:
            STEPS[task.model](learner)
            if learner.step % every and learner.step != learner.total_steps:
                continue
            row = {"model": task.model, "seed": config.seed, "lr": config.lr}
            row |= {"confidence": "" if task.model == ALONE else config.unlabelled_confidence, "step": learner.step}
            row |= {"validation_error": learner.classification_error(), "test_error": ""}
            rows.append(row | {"seconds": round(time.perf_counter() - started, 1)})
            if rows[-1]["validation_error"] < best["validation_error"]:
                best, critic = rows[-1], copy.deepcopy(learner.critic.state_dict())
    chosen = Learner(task.config, images)
    chosen.critic.load_state_dict(critic)
    best["test_error"] = chosen.classification_error()
    return rows


def table(rows: Sequence[Row]) -> str:
    """In Markdown, of the chosen critics."""
    chosen = {
        model: {row["seed"]: row for row in rows if row["model"] == model and row["test_error"]} for model in TRIED
    }
    errors = {model: {seed: float(row["test_error"]) for seed, row in of.items()} for model, of in chosen.items()}
    lines = []
    for model, of in chosen.items():
        tested = list(errors[model].values())
        lower = sum(error < errors[ALONE][seed] for seed, error in errors[model].items())
        settings = Counter("/".join(filter(None, (row["lr"], row["confidence"]))) for row in of.values())
        steps = sorted(int(row["step"]) for row in of.values())
        lines.append(
            [
                model,
                ", ".join(f"{count} x {setting}" for setting, count in settings.most_common()),
                f"{steps[0]} to {steps[-1]}",
                f"{statistics.mean(float(row['validation_error']) for row in of.values()):.1%}",
                f"{statistics.mean(tested):.1%}, {min(tested):.1%} to {max(tested):.1%}",
                "-" if model == ALONE else f"{lower} of {len(tested)}",
            ]
        )
    header = ["model", "chosen: learning rate/confidence", "steps", "validation error"]
    return markdown([*header, "test error: mean, range over the seeds", "lower than labels alone"], lines)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, TrainConfig]:
    """The flags, and what loads the images."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="fashion-mnist", help="as of gpkernels train, with labels and held-out images"
    )
    parser.add_argument("--labels", type=int, default=400)
    parser.add_argument("--validation", type=int, default=1000, help="labelled images to choose by, beside --labels")
    parser.add_argument("--steps", type=int, default=2000, help="at most, of each setting")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--width", type=int, default=16, help="of both nets")
    parser.add_argument("--batch", type=int, default=64, help="images a step, half of them with a label")
    parser.add_argument("--jobs", type=int, default=experiments.cores(), help="processes")
    parser.add_argument("--runs", type=Path, default=Path("runs/labels"), help="where rows are kept, to go on with")
    parser.add_argument("--out", type=Path, help="the CSV file of results (default: in --runs)")
    options = parser.parse_args(arguments)
    base = TrainConfig(data=options.data, image_size=32)
    images = experiments.load(base)
    if images.labels is None or images.held_out() is None:
        parser.error(f"--data: wanted data with labels and held-out images, got {images.name}")
    if not 0 < options.validation < len(images.images):
        parser.error(f"--validation: wanted 1 to {len(images.images) - 1} images, got {options.validation}")
    return options, base


def main(arguments: Sequence[str] | None = None) -> None:
    options, base = parse(arguments)
    images = experiments.load(base)
    settings = {"data": options.data, "image_size": 32, "labels": options.labels, "steps": options.steps}
    settings |= {"ngf": options.width, "ndf": options.width, "batch_size": options.batch, "device": "cpu"}
    configs = [from_preset(SEMI, {**settings, "seed": seed}) for seed in range(options.seeds)]
    tasks = [Task(model, base, config, options.validation) for config in configs for model in TRIED]
    store = options.runs / f"{images.name}-{experiments.digest({**settings, **TRIED, 'n': options.validation})}"
    files = {task: store / f"{task.model.replace(' ', '-')}-seed{task.config.seed}.csv" for task in tasks}
    left = [task for task, file in files.items() if not file.is_file()]
    print(f"{images.name}: {len(left)} of {len(tasks)} models to train, each with 2 settings", flush=True)
    for rows in experiments.outcomes(train, left, options.jobs):
        experiments.write(store / f"{rows[0]['model'].replace(' ', '-')}-seed{rows[0]['seed']}.csv", rows)
        print(
            ", ".join(f"{key} {value}" for row in rows if row["test_error"] for key, value in row.items()), flush=True
        )
    found = [row for file in files.values() for row in experiments.read(file)]
    about = {"data": images.name, "labels": options.labels, "validation": options.validation}
    about |= {"width": options.width, "batch": options.batch, **machine(torch.device("cpu"))}
    out = options.out or store / f"{experiments.results_name('labels', images)}.csv"
    experiments.write(out, [{**row, **about} for row in found])
    print(f"{table(found)}\n{out}")


if __name__ == "__main__":
    main()
