"""`python -m benchmarks.spectral`: spectral norm of a critic's layers, forward and backward, against torch's own.

Variants take turns and start from the same vectors. "torch" reads every weight of a critic under
`torch.nn.utils.parametrizations.spectral_norm`, in training mode; "legacy" runs the forward pre-hooks of the older
`torch.nn.utils.spectral_norm`, which do the same before each forward; "gpkernels" updates and reads them under
`spectral_norm_all`; "ops" are the grouped Functions behind it, without modules. All then get the same gradients.
Before a time counts, normalised weights, gradients and vectors are compared; the weights have a dominant singular
value, with which vectors converge, for torch and we start our iterations at different ends. `ops` are the calls that
reach a device. On a CPU every case is timed twice: with the memory that a variant frees "managed" by the C library, as
in anybody's process, which returns some of it to the system and pays page faults when it needs it again, and "kept".
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as legacy_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

import gpkernels as gp
from benchmarks import counts, timing
from benchmarks.machine import machine, parser, save
from gpkernels.ops.spectral_norm.autograd import spectral_attach, spectral_update
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


class Head(torch.autograd.Function):
    """Takes all weights and sends each its gradient, as the layers of a net would: `torch.autograd.backward` with so
    many results checks each in Python, which no training step does."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return weights[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.grads


class Variant(ABC):
    def __init__(self, originals: list[Tensor], grads: list[Tensor]) -> None:
        self.originals, self.grads = originals, grads
        self.one = grads[0].new_ones(())

    def __call__(self) -> tuple[list[Tensor], list[Tensor]]:
        """The normalised weights and the gradients of the plain ones."""
        for weight in self.originals:
            weight.grad = None
        normalised = self.normalised()
        Head.apply(self.grads, *normalised).backward(self.one)
        return normalised, [weight.grad for weight in self.originals]  # type: ignore[misc]

    @abstractmethod
    def normalised(self) -> list[Tensor]: ...

    @abstractmethod
    def state(self) -> list[Tensor]:
        """u and v of each layer."""


class Modules(Variant):
    """Layers that are parametrized, by torch or, where there is a handle, by gpkernels."""

    def __init__(self, layers: list[nn.Module], grads: list[Tensor], handle: Handle | None = None) -> None:
        super().__init__([layer.parametrizations.weight.original for layer in layers], grads)
        self.layers, self.handle = layers, handle

    def state(self) -> list[Tensor]:
        found = [layer.parametrizations.weight[0] for layer in self.layers]
        return [x for each in found for x in (each._u, each._v)]

    def normalised(self) -> list[Tensor]:
        if self.handle is not None:
            self.handle.update()
        return [layer.weight for layer in self.layers]


class Legacy(Variant):
    """Layers under torch's older spectral norm, with weights and vectors of parametrized `layers`."""

    def __init__(self, plain: nn.ModuleList, layers: list[nn.Module], grads: list[Tensor]) -> None:
        self.layers = [legacy_spectral_norm(layer) for layer in plain]
        super().__init__([layer.weight_orig for layer in self.layers], grads)
        for layer, other in zip(self.layers, layers, strict=True):
            norm = other.parametrizations.weight[0]
            for vector, of_other in ((layer.weight_u, norm._u), (layer.weight_v, norm._v)):
                vector.copy_(of_other)

    def state(self) -> list[Tensor]:
        return [x for layer in self.layers for x in (layer.weight_u, layer.weight_v)]

    def normalised(self) -> list[Tensor]:
        for layer in self.layers:
            for hook in layer._forward_pre_hooks.values():
                hook(layer, ())
        return [layer.weight for layer in self.layers]


class Ops(Variant):
    def __init__(self, layers: list[nn.Module], grads: list[Tensor]) -> None:
        tensors = [layer.parametrizations.weight for layer in layers]
        super().__init__([each.original for each in tensors], grads)
        self.u, self.v = [each[0]._u for each in tensors], [each[0]._v for each in tensors]
        self.dims, self.targets = [0] * len(layers), [1.0] * len(layers)

    def state(self) -> list[Tensor]:
        return [x for pair in zip(self.u, self.v, strict=True) for x in pair]

    def normalised(self) -> list[Tensor]:
        (updated,) = spectral_update(self.originals, self.u, self.v, self.dims, self.targets, 1, EPS)
        return spectral_attach(updated, self.originals, self.targets, EPS)


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


def measure(
    name: str, make: Callable[[], list[nn.Module]], device: torch.device, rounds: int, memory: str
) -> list[dict[str, Any]]:
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
    weights = variants["ops"].originals
    times = timing.interleaved(variants, device, rounds, keep_memory=memory == "kept")
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
        for variant, taken in times.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("spectral", __doc__, 21).parse_args(arguments)
    device = torch.device(options.device)
    critics, rounds = (QUICK, 3) if options.quick else (CRITICS, options.rounds)
    about, rows = machine(device), []
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for memory in ("managed", "kept") if device.type == "cpu" else ("kept",):
        for name, make in critics.items():
            if options.only not in name:
                continue
            for row in measure(name, make, device, rounds, memory):
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
