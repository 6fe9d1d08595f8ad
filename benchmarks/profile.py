"""`python -m benchmarks.profile`: where the time of a step goes, call by call.

For each step the calls of torch, or on a GPU the kernels, that take most of it, with how often they run, and how much
of the wall clock they cover: the rest is the host. --out writes the tables to a file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import machine, parser
from benchmarks.problems import Step
from benchmarks.steps import Setting

SETTINGS = [
    Setting(step, critic, 64)
    for step in ("penalty step", "LS-GAN-PG step")
    for critic in ("DCGAN none", "DCGAN batch", "DCGAN spectral")
]
QUICK = [Setting("LS-GAN-PG step", "DCGAN batch", 8, 8, 32)]
SHOWN = 12
REPEATS = 5


def table(name: str, step: Step, device: torch.device) -> str:
    """The heaviest calls of one step, as text."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(REPEATS):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    wall = (time.perf_counter() - started) / REPEATS * 1e6
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(REPEATS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    spent: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros > 0 and (not on_gpu or event.device_type.name == "CUDA"):
            spent[event.key] = micros / REPEATS, event.count // REPEATS
    total = sum(micros for micros, _ in spent.values())
    lines = [f"{name}: {wall:.0f} us, of which {total:.0f} us in {sum(n for _, n in spent.values())} calls"]
    for key, (micros, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:SHOWN]:
        lines.append(f"{micros:>10.1f} us {micros / total:>6.1%} {count:>5} x {key[:90]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("profile", __doc__, 1).parse_args(arguments)
    device = torch.device(options.device)
    about: dict[str, Any] = machine(device)
    texts = [", ".join(f"{key} {value}" for key, value in about.items())]
    for setting in QUICK if options.quick else SETTINGS:
        if options.only in setting.name:
            problem = setting.make(device)
            texts += [table(f"{setting.name}, {name}", step, device) for name, step in problem.variants.items()]
    print("\n\n".join(texts))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
