"""`python -m benchmarks.predictions`: what the ops and the steps should take on two GPUs.

A model, not a measurement: bytes at 90 % of the datasheet's memory bandwidth, arithmetic at 40 % of its TF32 rate, and
a fixed time for every launch, one after the other. It knows neither caches (a tensor that fits into the L2 cache, 50 MB
on both, may be faster) nor the host, which small eager steps wait for: a step is timed as a CUDA graph of it would be.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch

from benchmarks import counts, steps
from benchmarks.cases import CASES, SHAPES, Cost
from benchmarks.spectral import CRITICS


class Gpu(NamedTuple):
    """NVIDIA's datasheet: bytes/s, and TF32 operations/s of dense matrices."""

    bandwidth: float
    tf32: float


GPUS = {"H100 SXM": Gpu(3.35e12, 494.7e12), "H200": Gpu(4.8e12, 494.7e12)}
BANDWIDTH_REACHED = 0.9  # by a streaming kernel
TF32_REACHED = 0.4  # by a convolution
LAUNCH = 2.5e-6  # seconds from the start of one small kernel to that of the next
VARIANTS = ("snippet", "best", "gpkernels")


def seconds(gpu: Gpu, moved: float, launches: int, flops: float = 0) -> float:
    return moved / (BANDWIDTH_REACHED * gpu.bandwidth) + flops / (TF32_REACHED * gpu.tf32) + launches * LAUNCH


def ops_table() -> list[list[str]]:
    """A row for each case and shape, in microseconds."""
    lines = [["case", "shape", *(f"{name}: {variant}" for name in GPUS for variant in VARIANTS)]]
    for shape in SHAPES:
        for case in CASES:
            costs = [case.costs[variant] for variant in VARIANTS]
            size = 4 * math.prod(shape)
            times = [seconds(gpu, c.passes * size, c.launches) for gpu in GPUS.values() for c in costs]
            lines.append([case.name, "x".join(map(str, shape)), *(f"{t * 1e6:.1f}" for t in times)])
    return lines


def steps_table(settings: list[steps.Setting]) -> list[list[str]]:
    """A row for each setting, from counts of a run on the CPU, in milliseconds."""
    header = ["step", *(f"{name}: {variant}" for name in GPUS for variant in ("usual", "best", "gpkernels"))]
    lines = [[*header, *(f"{name}: over usual" for name in GPUS)]]
    for setting in settings:
        variants = setting.make(torch.device("cpu")).variants
        counted = [counts.count(variants[name]) for name in ("usual", "best", "gpkernels")]
        times = [[seconds(gpu, c.bytes, c.ops, c.flops) for c in counted] for gpu in GPUS.values()]
        cells = [f"{t * 1e3:.2f}" for of_gpu in times for t in of_gpu]
        lines.append([setting.name, *cells, *(f"{usual / ours:.2f}x" for usual, _, ours in times)])
    return lines


def spectral_costs(layers: int) -> dict[str, Cost]:
    """Of spectral norm, forward and backward, of up to 64 layers; the tensor of `Cost` is all their weights.

    gpkernels reads them twice for an iteration, and reads and writes them to scale; backward it reads gradients and
    weights, then reads gradients and writes results. torch's 22 calls a layer read and write 21 such tensors.
    """
    return {"torch": Cost(21, 22 * layers), "gpkernels": Cost(2 + 2 + 4, 3 + 1 + 2)}


def spectral_table() -> list[list[str]]:
    """A row for each critic, in microseconds."""
    lines = [["critic", *(f"{name}: {variant}" for name in GPUS for variant in spectral_costs(1))]]
    for name, make in CRITICS.items():
        weights = [layer.weight for layer in make()]
        costs, size = spectral_costs(len(weights)).values(), sum(weight.nbytes for weight in weights)
        times = [seconds(gpu, c.passes * size, c.launches) for gpu in GPUS.values() for c in costs]
        lines.append([name, *(f"{t * 1e6:.1f}" for t in times)])
    return lines


def markdown(lines: list[list[str]]) -> str:
    left = 2 if lines[0][1] == "shape" else 1
    rule = ["---"] * left + ["---:"] * (len(lines[0]) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small critics")
    options = parser.parse_args()
    print("Predicted by a model, not measured: float32, gpkernels on its Triton backend.")
    print(f"bytes / ({BANDWIDTH_REACHED} x bandwidth) + operations / ({TF32_REACHED} x TF32 rate) ", end="")
    print(f"+ launches x {LAUNCH * 1e6} us; ", end="")
    print(", ".join(f"{name} {gpu.bandwidth / 1e12} TB/s, {gpu.tf32 / 1e12} TFLOP/s" for name, gpu in GPUS.items()))
    print("\nOps, microseconds:\n")
    print(markdown(ops_table()))
    print("\nSpectral norm of a critic's weights, forward and backward, microseconds:\n")
    print(markdown(spectral_table()))
    print("\nSteps of a critic, milliseconds, a launch for each call that reaches the device:\n")
    print(markdown(steps_table(steps.QUICK if options.quick else steps.SETTINGS)))


if __name__ == "__main__":
    main()
