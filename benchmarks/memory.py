"""The peak memory of one step of `benchmarks.steps`, in MiB: a process of its own, since a peak is of the process."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from benchmarks.steps import Setting


def main() -> None:
    setting, variant, device_name = json.loads(sys.argv[1])
    device = torch.device(device_name)
    # a small step first, so that what libraries set up once does not count
    _, small = Setting(**{**setting, "batch": 2}).make(device)
    small[variant]()
    _, variants = Setting(**setting).make(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variants[variant]()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        variants[variant]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(round(peak / 2**20, 1))


main()
