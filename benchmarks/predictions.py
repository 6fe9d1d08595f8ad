"""`python -m benchmarks.predictions`: what the cases should take on two GPUs, in microseconds.

A model, not a measurement: bytes at 90 % of the datasheet's memory bandwidth, plus a fixed time for every launch. It
knows neither arithmetic nor caches: a tensor that fits into the L2 cache (50 MB on both) may be faster.
"""

from __future__ import annotations

import math

from benchmarks.cases import CASES, SHAPES, Cost
from benchmarks.spectral import CRITICS

BANDWIDTHS = {"H100 SXM": 3.35e12, "H200": 4.8e12}  # bytes/s, NVIDIA's datasheets
REACHED = 0.9  # the share of it that a streaming kernel reaches
LAUNCH = 2.5e-6  # seconds from the start of one small kernel to that of the next
VARIANTS = ("snippet", "best", "gpkernels")


def seconds(cost: Cost, tensor_bytes: int, bandwidth: float) -> float:
    return cost.passes * tensor_bytes / (REACHED * bandwidth) + cost.launches * LAUNCH


def table() -> str:
    """Markdown, a row for each case and shape."""
    header = ["case", "shape", *(f"{gpu}: {variant}" for gpu in BANDWIDTHS for variant in VARIANTS)]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for shape in SHAPES:
        for case in CASES:
            times = [
                f"{seconds(case.costs[variant], 4 * math.prod(shape), bandwidth) * 1e6:.1f}"
                for bandwidth in BANDWIDTHS.values()
                for variant in VARIANTS
            ]
            lines.append([case.name, "x".join(map(str, shape)), *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spectral_costs(layers: int) -> dict[str, Cost]:
    """Of spectral norm, forward and backward, of up to 64 layers; the tensor of `Cost` is all their weights.

    gpkernels reads them twice for an iteration, and reads and writes them to scale; backward it reads gradients and
    weights, then reads gradients and writes results. torch's 22 calls a layer read and write 21 such tensors.
    """
    return {"torch": Cost(21, 22 * layers), "gpkernels": Cost(2 + 2 + 4, 3 + 1 + 2)}


def spectral_table() -> str:
    """Markdown, a row for each critic."""
    variants = spectral_costs(1)
    header = ["critic", *(f"{gpu}: {variant}" for gpu in BANDWIDTHS for variant in variants)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, make in CRITICS.items():
        weights = [layer.weight for layer in make()]
        costs, size = spectral_costs(len(weights)), sum(weight.nbytes for weight in weights)
        times = [
            f"{seconds(costs[variant], size, bandwidth) * 1e6:.1f}"
            for bandwidth in BANDWIDTHS.values()
            for variant in variants
        ]
        lines.append([name, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    print("Predicted by a model, not measured: microseconds, float32, gpkernels on its Triton backend.")
    print(f"bytes / ({REACHED} x bandwidth) + launches x {LAUNCH * 1e6} us; ", end="")
    print(", ".join(f"{gpu} {bandwidth / 1e12} TB/s" for gpu, bandwidth in BANDWIDTHS.items()), end="\n\n")
    print(table(), end="\n\n")
    print("Spectral norm of a critic's weights, forward and backward:", end="\n\n")
    print(spectral_table())


if __name__ == "__main__":
    main()
