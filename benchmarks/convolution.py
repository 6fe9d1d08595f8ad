"""`python -m benchmarks.convolution`: the input gradient of a critic's first layers, C++ against torch, on a CPU.

"forward" is the convolution itself, with as many multiplications. Every case is timed, also those for which the
engine leaves the work to torch (column `taken`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.machine import machine, parser, save
from gpkernels.ops.conv2d_input_gradient import conv2d_input_gradient, reference, wins

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Layer:
    name: str
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int
    padding: int


LAYERS = (
    Layer("DCGAN-64, layer 1", 3, 64, 64, 4, 2, 1),
    Layer("DCGAN-64, layer 2", 64, 128, 32, 4, 2, 1),
    Layer("DCGAN-64 of width 16, layer 1", 3, 16, 64, 4, 2, 1),
    Layer("DCGAN-64 of width 16, layer 2", 16, 32, 32, 4, 2, 1),
    Layer("DCGAN-64 of width 16, layer 3", 32, 64, 16, 4, 2, 1),
    Layer("DCGAN-32, grey, layer 1", 1, 64, 32, 4, 2, 1),
    Layer("labels as maps, layer 1", 13, 64, 32, 4, 2, 1),
    Layer("5x5, stride 2", 3, 64, 64, 5, 2, 2),
    Layer("ResNet-32, layer 1", 3, 128, 32, 3, 1, 1),
    Layer("ResNet-64, layer 1", 3, 64, 64, 3, 1, 1),
    Layer("ResNet, shortcut of block 1", 3, 128, 32, 1, 1, 0),
    Layer("3x3, 16 channels", 16, 64, 32, 3, 1, 1),
)


@torch.no_grad()  # as where the engine calls it
def measure(layer: Layer, layout: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    form = LAYOUTS[layout]
    stride, padding = (layer.stride,) * 2, (layer.padding,) * 2
    x = torch.randn(batch, layer.channels, layer.size, layer.size).contiguous(memory_format=form)
    w = torch.randn(layer.outputs, layer.channels, layer.kernel, layer.kernel).contiguous(memory_format=form)
    g = torch.randn_like(F.conv2d(x, w, None, stride, padding))

    def torchs() -> Tensor:
        return reference.conv2d_input_gradient(g, w, x, stride, padding)

    def ours() -> Tensor:
        return conv2d_input_gradient(g, w, x, stride, padding)

    error = (ours() - torchs()).norm() / torchs().norm()
    if not error < 1e-5:
        print(f"{layer.name}, {layout}: results differ by {error:.1e}, not timed")
        return []
    variants = {"forward": lambda: F.conv2d(x, w, None, stride, padding), "torch": torchs, "gpkernels": ours}
    times = timing.interleaved(variants, x.device, rounds)
    flops = 2 * g.numel() * w[0].numel()
    return [
        {
            "case": layer.name,
            "layout": layout,
            "batch": batch,
            "variant": name,
            **taken.milliseconds(),
            "gflop_per_s": round(flops / taken.median / 1e9, 1),
            "speedup": round(times["torch"].median / taken.median, 3),
            "taken": wins(g, w, x, stride),
        }
        for name, taken in times.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("convolution", __doc__, 21).parse_args(arguments)
    device = torch.device(options.device)
    if device.type != "cpu":
        raise SystemExit("benchmarks.convolution: the kernel is for a CPU; use --device cpu")
    about, rows = machine(device), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for layer in LAYERS:
        for layout in LAYOUTS:
            if options.only not in layer.name:
                continue
            for row in measure(layer, layout, 8 if options.quick else 64, 3 if options.quick else options.rounds):
                rows.append({**row, **about})
                note = "" if row["taken"] else "  not taken"
                print(
                    f"{row['case']:30} {layout:14} {row['variant']:10} {row['median_ms']:>8} ms "
                    f"{row['gflop_per_s']:>6} GFLOP/s {row['speedup']:>6} x torch{note}",
                    flush=True,
                )
    if options.out and rows:
        save(options.out, rows)


if __name__ == "__main__":
    main()
