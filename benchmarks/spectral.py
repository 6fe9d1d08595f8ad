"""`python -m benchmarks.spectral`: spectral norm of a critic's layers, forward and backward, against torch's own.

Variants take turns and start from the same vectors. "torch" reads every weight of a critic under
`torch.nn.utils.parametrizations.spectral_norm`, in training mode; "legacy" runs the forward pre-hooks of the older
`torch.nn.utils.spectral_norm`, which do the same before each forward; "gpkernels" updates and reads them under
`spectral_norm_all`; "ops" are the grouped Functions behind it, without modules. All then send the same gradients back.
Before a time counts, normalised weights, gradients and vectors are compared; the weights have a dominant singular
value, with which vectors converge, for torch and we start our iterations at different ends. `ops` are the calls that
reach a device. On a CPU every case is timed twice: with the memory that a variant frees "kept" in the process, and
"returned" to the system as glibc does by itself, which makes every large tensor cost its page faults.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as legacy_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

import gpkernels as gp
from benchmarks import counts, timing
from benchmarks.machine import machine, parser, save
from gpkernels.ops.spectral_norm.autograd import spectral_iterate, spectral_scale
from gpkernels.spectral import Handle

EPS = 1e-12


def dcgan(width: int = 64) -> list[nn.Module]:
    """DCGAN's critic for 64x64 images (Radford et al. 2016)."""
    widths = [3, width, 2 * width, 4 * width, 8 * width]
    return [*(nn.Conv2d(a, b, 4, 2, 1) for a, b in itertools.pairwise(widths)), nn.Conv2d(widths[-1], 1, 4)]


def resnet(widths: list[int], last: int) -> list[nn.Module]:
    """SNGAN's critic (Miyato et al. 2018): blocks of two 3x3 convolutions and, where they downsample, a 1x1; `last`
    blocks keep the size."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3), nn.Conv2d(b, b, 3), nn.Conv2d(a, b, 1)]
    width = widths[-1]
    layers += [nn.Conv2d(width, width, 3) for _ in range(2 * last)]
    return [*layers, nn.Linear(width, 1)]


CRITICS: dict[str, Callable[[], list[nn.Module]]] = {
    "DCGAN-64": dcgan,
    "SNGAN-ResNet-32": lambda: resnet([3, 128, 128], 2),
    "SNGAN-ResNet-64": lambda: resnet([3, 64, 128, 256, 512, 1024], 1),
}
QUICK: dict[str, Callable[[], list[nn.Module]]] = {
    "DCGAN-64, width 8": lambda: dcgan(8),
    "ResNet, width 8": lambda: resnet([3, 8, 8], 1),
}


def spiked(layer: nn.Module) -> nn.Module:
    """The layer with a singular value well above the others."""
    with torch.no_grad():
        w = layer.weight.flatten(1)
        u, v = (nn.functional.normalize(torch.randn(n), dim=0) for n in w.shape)
        w += 3 * torch.linalg.matrix_norm(w, 2) * torch.outer(u, v)
    return layer


Result = tuple[list[Tensor], list[Tensor]]
"""Normalised weights and the gradients of the plain ones."""


class Modules:
    """Layers that are parametrized, by torch or, where there is a handle, by gpkernels."""

    def __init__(self, layers: list[nn.Module], grads: list[Tensor], handle: Handle | None = None) -> None:
        self.layers, self.grads, self.handle = layers, grads, handle

    def state(self) -> list[Tensor]:
        found = [layer.parametrizations.weight[0] for layer in self.layers]
        return [x for each in found for x in (each._u, each._v)]

    def __call__(self) -> Result:
        for layer in self.layers:
            layer.parametrizations.weight.original.grad = None
        if self.handle is not None:
            self.handle.update()
        normalised = [layer.weight for layer in self.layers]
        torch.autograd.backward(normalised, self.grads)
        return normalised, [layer.parametrizations.weight.original.grad for layer in self.layers]


class Legacy:
    """Layers under torch's older spectral norm, with weights and vectors of parametrized `layers`."""

    def __init__(self, plain: nn.ModuleList, layers: list[nn.Module], grads: list[Tensor]) -> None:
        self.layers, self.grads = [legacy_spectral_norm(layer) for layer in plain], grads
        for layer, other in zip(self.layers, layers, strict=True):
            norm = other.parametrizations.weight[0]
            for vector, of_other in ((layer.weight_u, norm._u), (layer.weight_v, norm._v)):
                vector.copy_(of_other)

    def state(self) -> list[Tensor]:
        return [x for layer in self.layers for x in (layer.weight_u, layer.weight_v)]

    def __call__(self) -> Result:
        for layer in self.layers:
            layer.weight_orig.grad = None
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        normalised = [layer.weight for layer in self.layers]
        torch.autograd.backward(normalised, self.grads)
        return normalised, [layer.weight_orig.grad for layer in self.layers]


class Ops:
    def __init__(self, layers: list[nn.Module], grads: list[Tensor]) -> None:
        tensors = [layer.parametrizations.weight for layer in layers]
        self.grads = grads
        self.weights = [each.original for each in tensors]
        self.u, self.v = [each[0]._u for each in tensors], [each[0]._v for each in tensors]
        self.dims, self.targets = [0] * len(layers), [1.0] * len(layers)

    def state(self) -> list[Tensor]:
        return [x for pair in zip(self.u, self.v, strict=True) for x in pair]

    def __call__(self) -> Result:
        for weight in self.weights:
            weight.grad = None
        sigma = spectral_iterate(self.weights, self.u, self.v, self.dims, 1, EPS)
        normalised = spectral_scale(self.weights, self.u, self.v, sigma, self.dims, self.targets, EPS)
        torch.autograd.backward(normalised, self.grads)
        return normalised, [weight.grad for weight in self.weights]


def differs(variants: dict[str, Any]) -> str:
    """In what the variants' results differ by more than rounding; empty when in nothing."""
    results = []
    for variant in variants.values():
        normalised, grads = variant()
        results.append([*(x.detach() for x in normalised), *(g.clone() for g in grads), *variant.state()])
    for name, result in zip(variants, results, strict=True):
        for i, (a, b) in enumerate(zip(results[0], result, strict=True)):
            error = (a - b).norm() / a.norm()
            if not error < 1e-4:
                return f"{name}: result {i}, of shape {tuple(a.shape)}, differs by {error:.1e}"
    return ""


def measure(name: str, make: Callable[[], list[nn.Module]], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    plain = nn.ModuleList(spiked(layer).to(device) for layer in make())
    ours, older = copy.deepcopy(plain), copy.deepcopy(plain)
    layers = [spectral_norm(layer) for layer in plain]
    handle = gp.spectral_norm_all(ours)
    ours.load_state_dict(plain.state_dict())
    grads = [torch.randn_like(layer.weight) for layer in layers]
    variants = {
        "torch": Modules(layers, grads),
        "legacy": Legacy(older, layers, grads),
        "gpkernels": Modules(list(ours), grads, handle),
        "ops": Ops(copy.deepcopy(layers), grads),
    }
    problem = differs(variants)
    if problem:
        print(f"{name}: {problem}, not timed")
        return []
    weights = variants["ops"].weights
    measured = {"kept": timing.interleaved(variants, device, rounds)}
    if device.type == "cpu":
        measured["returned"] = timing.interleaved(variants, device, rounds, keep_memory=False)
    return [
        {
            "case": name,
            "layers": len(weights),
            "weights_mib": round(sum(w.nbytes for w in weights) / 2**20, 1),
            "memory": memory,
            "variant": variant,
            **taken.milliseconds(),
            "speedup": round(times["torch"].median / taken.median, 3),
            "ops": counts.count(variants[variant]).ops,
        }
        for memory, times in measured.items()
        for variant, taken in times.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("spectral", __doc__, 21).parse_args(arguments)
    device = torch.device(options.device)
    critics, rounds = (QUICK, 3) if options.quick else (CRITICS, options.rounds)
    about, rows = machine(device), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for name, make in critics.items():
        if options.only not in name:
            continue
        for row in measure(name, make, device, rounds):
            rows.append({**row, **about})
            print(
                f"{row['case']:20} {row['layers']:>3} layers {row['weights_mib']:>6} MiB {row['memory']:8} "
                f"{row['variant']:10} "
                f"{row['median_ms']:>9} ms {row['speedup']:>6} x torch {row['ops']:>4} ops",
                flush=True,
            )
        if options.out and rows:
            save(options.out, rows)


if __name__ == "__main__":
    main()
