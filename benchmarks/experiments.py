"""What the training experiments share: rows in files that survive an interruption, workers, measured samples."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks import machine
from gpkernels.errors import UserError
from gpkernels.metrics import Evaluator, Result
from gpkernels.metrics.features import EfficientNetLite0
from gpkernels.training import Learner, TrainConfig, data, models
from gpkernels.training.data import ImageSet

Row = dict[str, str]
Task = TypeVar("Task")
Done = TypeVar("Done")

SAMPLES_SEED = 1
"""Of the latent vectors that every measurement draws: the same at every epoch, so that curves do not jitter."""


def read(path: Path) -> list[Row]:
    """The rows of a CSV file as text; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys as a CSV file, written beside and renamed. A float is read back as the same float."""
    machine.save(path, [{key: str(value) for key, value in row.items()} for row in rows])


def number(text: str) -> float:
    """A cell's number, NaN where it is empty."""
    return float(text) if text else math.nan


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))


def digest(settings: Mapping[str, Any]) -> str:
    """A name for settings: rows and checkpoints of others never lie in the same folder."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def results_name(experiment: str, images: ImageSet) -> str:
    return f"{machine.today()}-{experiment}-{images.name}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def outcomes(work: Callable[[Task], Done], tasks: Sequence[Task], jobs: int) -> Iterator[Done]:
    """`work(task)` of each, as they are done: in this process for one job, else in so many, the cores shared out.

    The first exception ends it; tasks that have not begun are dropped.
    """
    if min(jobs, len(tasks)) <= 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, cores() // jobs)
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def found_data(name: str | None) -> str:
    """`name`, or by default fashion-mnist where it is found, else lfw-mini."""
    if name is not None:
        return name
    try:
        data.load(TrainConfig(data="fashion-mnist", max_images=1))
    except UserError as error:
        print(f"lfw-mini is taken: {error}")
        return "lfw-mini"
    return "fashion-mnist"


def found_metrics() -> list[str]:
    """swd, and kid_effnetlite0 where its packages are."""
    try:
        EfficientNetLite0(torch.device("cpu"))
    except UserError as error:
        print(f"no KID: {error}")
        return ["swd"]
    return ["swd", "kid_effnetlite0"]


def not_finite(terms: Mapping[str, Tensor]) -> str:
    """The first term that is not finite, with its value; empty where there is none."""
    values = torch.stack([value.detach().float() for value in terms.values()]).tolist()
    return next(
        (f"{name} is {value}" for name, value in zip(terms, values, strict=True) if not math.isfinite(value)), ""
    )


class Judge:
    """Measures samples against the same real images: those held out where the data has some, else those trained on.

    `sizes` is {metric: how many samples, and at most as many real images}; features of real images are computed once.
    """

    def __init__(self, images: ImageSet, sizes: Mapping[str, int], device: str = "cpu") -> None:
        held_out = images.held_out()
        self.part = "training" if held_out is None else "held-out"
        real = torch.from_numpy((images if held_out is None else held_out).images)
        self.evaluators = {name: Evaluator(real, [name], n=n, device=device) for name, n in sizes.items()}

    def __call__(self, sampler: Callable[[int], Tensor], names: Iterable[str]) -> dict[str, Result]:
        return {name: self.evaluators[name](sampler)[name] for name in names}


def sampler(learner: Learner) -> Callable[[int], Tensor]:
    """Samples of a learner's averaged generator."""

    def draw(n: int) -> Tensor:
        z = models.draw_z(learner.config, n, torch.Generator().manual_seed(SAMPLES_SEED))
        return torch.cat([learner.sample(part) for part in z.split(500)])

    return draw


@functools.lru_cache(maxsize=1)
def load(config: TrainConfig) -> ImageSet:
    """The data of a config, kept in the process; pass one that differs in nothing else between calls."""
    return data.load(config)
