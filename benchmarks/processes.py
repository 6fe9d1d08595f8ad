"""`python -m benchmarks.processes`: a model of training in more processes than there are machines for, not measured.

Measured, here: what a step takes in one process with its part of the batch, and how many bytes and messages a process
exchanges in it, counted in two real ones. Assumed: a link, and that nothing is computed while bytes travel. Then R
processes, each with as many images as the one, take

    step + 2 (R - 1) / R * bytes / bandwidth + 2 ceil(log2 R) * latency * messages

(the bandwidth of a ring all-reduce, the latency of a tree). DDP does overlap, so the truth is likely better; slower
hosts, a shared network and waiting for the slowest make it worse.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.machine import machine, save
from gpkernels.training import Learner, TrainConfig, from_preset
from gpkernels.training.data import ImageSet
from gpkernels.training.processes import join, pick_device


@dataclasses.dataclass
class Traffic:
    """What one process hands to collectives in a step."""

    bytes: int = 0
    messages: int = 0

    def add(self, tensor: torch.Tensor) -> None:
        self.bytes += tensor.numel() * tensor.element_size()
        self.messages += 1


@dataclasses.dataclass(frozen=True)
class Link:
    bandwidth: float  # bytes a second, of each process
    latency: float  # seconds a hop


def predicted(step: float, traffic: Traffic, link: Link, processes: int) -> float:
    """Seconds a step of so many processes, each of which computes for `step` seconds."""
    moved = 2 * (processes - 1) / processes * traffic.bytes / link.bandwidth
    hops = 2 * math.ceil(math.log2(processes))
    return step + moved + hops * link.latency * traffic.messages


@contextmanager
def counted(learner: Learner) -> Iterator[Traffic]:
    """What `learner`, one of several processes, exchanges in the block, but for the hosts' single flags."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    traffic, plain = Traffic(), (dist.all_gather, dist.all_reduce)

    def gather(parts: Any, tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        traffic.add(tensor)
        return plain[0](parts, tensor, *rest, **more)

    def reduce(tensor: torch.Tensor, *rest: Any, **more: Any) -> Any:
        traffic.add(tensor)
        return plain[1](tensor, *rest, **more)

    for net in learner._parallel.values():
        net.register_comm_hook(None, allreduce_hook)  # what DDP does anyway, by way of dist.all_reduce
    dist.all_gather, dist.all_reduce = gather, reduce
    try:
        yield traffic
    finally:
        dist.all_gather, dist.all_reduce = plain


def noise(config: TrainConfig) -> ImageSet:
    size = config.image_size or 64
    images = np.random.default_rng(0).integers(0, 256, (2 * config.batch_size, 3, size, size), dtype=np.uint8)
    return ImageSet("noise", images)


def _count(rank: int, config: TrainConfig, port: int, results: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    with join("cpu"):
        learner = Learner(dataclasses.replace(config, device="cpu"), noise(config))
        with counted(learner) as traffic:
            learner.train_step()
        if rank == 0:
            results.put(traffic)


def traffic_of(config: TrainConfig) -> Traffic:
    """Counted in two processes on this machine's CPU, in the first step of a lazy penalty's interval."""
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    torch.multiprocessing.spawn(_count, (config, port, results), nprocs=2)
    return results.get()


def step_seconds(config: TrainConfig, repeats: int = 10) -> float:
    """The median time of a step of one process, after three that warm up."""
    learner, times = Learner(config, noise(config)), []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        float(learner.train_step()["critic_loss"])  # waits for a GPU
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def rows_of(
    config: TrainConfig, step: float, traffic: Traffic, link: Link, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each number of processes: what was measured, what is assumed, what follows."""
    found = []
    for count in counts:
        seconds, images = predicted(step, traffic, link, count), count * config.batch_size
        found.append(
            {
                "preset": config.preset,
                "image_size": config.image_size,
                "images_a_process": config.batch_size,
                "measured_step_ms": round(step * 1e3, 1),
                "exchanged_mb": round(traffic.bytes / 1e6, 1),
                "messages": traffic.messages,
                "assumed_gb_per_s": link.bandwidth / 1e9,
                "assumed_hop_us": link.latency * 1e6,
                "processes": count,
                "added_ms": round((seconds - step) * 1e3, 2),
                "images_per_s": round(images / seconds),
                "efficiency": round(step / seconds, 4),
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="ls-gan-pg")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of each process (default: 25, 200 Gb/s)")
    parser.add_argument("--latency", type=float, default=20.0, help="us a hop (default: 20)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256])
    parser.add_argument("--out", type=Path, help="write the rows to this CSV file")
    given = parser.parse_args(argv)
    settings = {"image_size": given.image_size, "batch_size": given.batch_size, "device": given.device}
    config = from_preset(given.preset, settings)
    link = Link(given.bandwidth * 1e9, given.latency * 1e-6)
    traffic = traffic_of(dataclasses.replace(config, batch_size=2))  # the bytes do not depend on the batch
    about = machine(pick_device(config.device))
    rows = [{**row, **about} for row in rows_of(config, step_seconds(config), traffic, link, given.processes)]
    first = rows[0]
    print("A model, not a measurement. " + ", ".join(f"{key} {first[key]}" for key in list(first)[:8]))
    for row in rows:
        print(
            f"{row['processes']:>4} processes: + {row['added_ms']} ms a step, {row['images_per_s']} images/s, "
            f"efficiency {row['efficiency']:.1%}"
        )
    if given.out:
        save(given.out, rows)


if __name__ == "__main__":
    main()
