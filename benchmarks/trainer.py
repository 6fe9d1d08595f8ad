"""`python -m benchmarks.trainer`: images/s of the reference trainer, and what shares of a step its parts have.

Whole training steps of presets, on images that are prepared as for training and mapped from a file. "data" is reading,
augmenting and moving images, and drawing z; "generator" and "critic" are their forwards, backwards and optimizers
without a penalty; "penalty" is by how much the critic's update is longer than in the same run without one; "average" is
the generator's moving average. Both runs take turns. loader_images_per_s is what "data" alone would reach: it happens
within the step, nothing is fetched ahead.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine, parser, save
from gpkernels.training import Learner, TrainConfig, from_preset
from gpkernels.training.data import ImageSet

PRESETS: dict[str, dict[str, Any]] = {
    "ls-gan-pg": {"image_size": 64},
    "ls-gan-pg-mini": {"image_size": 32},
    "wgan-gp": {"image_size": 64, "ngf": 32, "ndf": 32, "batch_size": 32},
    "r1": {"image_size": 32, "ngf": 16, "ndf": 16, "batch_size": 16},
    "sngan": {"image_size": 32, "ngf": 32, "ndf": 32, "batch_size": 32},
}
SMALL = {"ngf": 8, "ndf": 8, "batch_size": 4}
SPANS = {
    "data": "_inputs",
    "critic": "_update_critic",
    "generator": "_update_generator",
    "average": "_update_average",
}
"""Parts of a step, and the methods of the learner that they are; the rest is generating images for the critic."""


class Timed:
    """A learner that keeps the seconds of each part of its steps."""

    def __init__(self, config: TrainConfig, images: ImageSet) -> None:
        self.learner = Learner(config, images)
        self.seconds: dict[str, list[float]] = {name: [] for name in (*SPANS, "step")}
        for name, method in SPANS.items():
            setattr(self.learner, method, self._timed(name, getattr(self.learner, method)))
        self.step = self._timed("step", self.learner.train_step)

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._wait()
            started = time.perf_counter()
            result = call(*args, **kwargs)
            self._wait()
            self.seconds[name].append(time.perf_counter() - started)
            return result

        return run

    def _wait(self) -> None:
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        for values in self.seconds.values():
            values.clear()

    def medians(self) -> dict[str, float]:
        """Of a step; a part that runs several times in one counts as often."""
        steps = len(self.seconds["step"])
        return {name: statistics.median(v) * len(v) / steps if v else 0.0 for name, v in self.seconds.items()}


def measure(preset: str, settings: dict[str, Any], device: str, rounds: int, folder: Path) -> dict[str, Any]:
    config = from_preset(preset, {**settings, "device": device})
    size = settings["image_size"]
    path = folder / f"{size}.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).integers(0, 256, (8192, 3, size, size), np.uint8))
    images = ImageSet("noise", np.load(path, mmap_mode="c"))
    with_penalty = Timed(config, images)
    without = Timed(dataclasses.replace(config, penalty="none"), images)
    for round_ in range(rounds + 2):
        if round_ == 2:
            with_penalty.clear(), without.clear()
        for timed in (with_penalty, without):
            timed.step()
    spent, plain = with_penalty.medians(), without.medians()
    step = spent["step"]
    critic = min(plain["critic"], spent["critic"])
    parts = {
        "data": spent["data"],
        "critic": critic,
        "penalty": spent["critic"] - critic,
        "generator": step - spent["data"] - spent["critic"] - spent["average"],
        "average": spent["average"],
    }
    return {
        "preset": preset,
        "penalty_kind": config.penalty,
        "image_size": size,
        "batch": config.batch_size,
        "critic_steps": config.critic_steps,
        "ms_per_step": round(step * 1e3, 2),
        "images_per_s": round(config.batch_size * config.critic_steps / step, 1),
        "loader_images_per_s": round(config.batch_size * config.critic_steps / spent["data"]),
        **{f"{name}_share": round(seconds / step, 4) for name, seconds in parts.items()},
        "over_no_penalty": round(step / plain["step"], 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("trainer", __doc__, 15).parse_args(arguments)
    about, rows = machine(torch.device(options.device)), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    with tempfile.TemporaryDirectory() as folder:
        for preset, settings in PRESETS.items():
            if options.only not in preset:
                continue
            settings = {**settings, **SMALL} if options.quick else settings
            row = measure(preset, settings, options.device, 3 if options.quick else options.rounds, Path(folder))
            rows.append({**row, **about})
            shares = "  ".join(f"{key[:-6]} {value:.1%}" for key, value in row.items() if key.endswith("_share"))
            print(
                f"{preset:16} {row['image_size']:>3} px, batch {row['batch']:>3}  {row['images_per_s']:>8} images/s "
                f"(loader {row['loader_images_per_s']})  "
                f"{row['over_no_penalty']:.2f} of a step without its penalty  {shares}",
                flush=True,
            )
            if options.out:
                save(options.out, rows)


if __name__ == "__main__":
    main()
