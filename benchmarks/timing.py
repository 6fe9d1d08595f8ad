"""The timing protocol: variants in turn, round by round, medians and quantiles over the rounds.

A sample is the time of as many calls as fill `TARGET` seconds, divided by their number, so the clock's resolution does
not matter. Variants take turns within each round, and each round begins with the next of them, so that drift of the
machine and what a variant leaves in the caches fall on all alike. On the CPU the process keeps the memory that it
frees, unless told otherwise: else a sample's time depends on what a variant before it has given back to the system.
On a GPU a sample lies between two events on the stream, after a warm-up, and the host runs ahead of the device.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

TARGET = 0.01
MAX_CALLS = 2000


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the rounds, and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float

    def milliseconds(self) -> dict[str, float]:
        """As columns of a result file."""
        values = {"median_ms": self.median, "p20_ms": self.low, "p80_ms": self.high}
        return {name: round(value * 1e3, 3) for name, value in values.items()}


def interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, *, keep_memory: bool = True
) -> dict[str, Timing]:
    """With keep_memory=False the allocator stays as it is, and gives large blocks back to the system as it sees fit:
    what a program pays that does nothing about it. Not after a call that kept memory, which lasts for the process."""
    if keep_memory:
        _keep_memory()
    elif _keep_memory.cache_info().currsize:
        raise RuntimeError("keep_memory: wanted True in a process that keeps its memory already, got False")
    sample = _cuda_sample if device.type == "cuda" else _host_sample
    calls = {}
    for name, run in variants.items():
        run()
        once = max(sample(run, 1), 1e-7)
        calls[name] = max(1, min(MAX_CALLS, round(TARGET / once)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(sample(variants[name], calls[name]))
    return {name: _summary(values) for name, values in seconds.items()}


@functools.cache
def _keep_memory() -> None:
    """By glibc's M_MMAP_MAX and M_TRIM_THRESHOLD; nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)
        mallopt(-1, -1)


def _summary(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), cuts[1], cuts[7])


def _host_sample(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _cuda_sample(run: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
