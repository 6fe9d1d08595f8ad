"""`gpkernels doctor`: what is built, which backend each op would use and why, and a check that runs each op."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import gpkernels as gp
from gpkernels import _native, registry


def report() -> int:
    """Prints the report; 0 if every available backend of every op agrees with the reference, 1 otherwise."""
    print(f"gpkernels {gp.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {sys.platform}")
    print(f"torch threads {torch.get_num_threads()}, CUDA device: {_cuda_device()}")
    if _native.build_info is not None:
        for key, value in _native.build_info.items():
            print(f"  native {key}: {value or 'none'}")
    if _native.missing:
        print(f"  native: {_native.missing}")
    for op in registry.ops():
        print(op)
        for device in ("cpu", "cuda"):
            print(f"  {device} tensors: {_choice(op, device)}")
    print("self-check against the reference (float32 and float64: value, first and second derivative)")
    failures = 0
    for op, check in _CHECKS.items():
        for backend in registry.BACKENDS[1:]:
            if (op, backend) not in registry._rows or registry.why_not(backend, op):
                continue
            error = max(check(backend, dtype) / tolerance(op, dtype) for dtype in (torch.float32, torch.float64))
            failures += not error <= 1
            print(f"  {op} on {backend}: {'ok' if error <= 1 else 'WRONG'} (worst error {error:.2f} of tolerance)")
    return 1 if failures else 0


def _cuda_device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _choice(op: str, device: str) -> str:
    """The backend used, then each one passed over with the reason."""
    passed_over: list[str] = []
    for name in registry.PREFERENCE[device]:
        reason = registry.why_not(name, op, device=device)
        if reason is None or (name == "reference" and not torch.cuda.is_available()):
            return "; ".join([name, *passed_over])
        passed_over.append(f"not {name}: {reason}")
    return "; ".join(["none", *passed_over])


def tolerance(op: str, dtype: torch.dtype) -> float:
    """Relative. perturb's noise is computed in float32 by different approximations of log, sin and cos."""
    return 1e-12 if dtype == torch.float64 and op != "perturb" else 1e-5


def _worst(make: Callable[[], tuple[Tensor, Tensor]], backend: str) -> float:
    """The largest relative error, over value, gradient and second derivative, of `backend` against the reference."""
    results = []
    for name in ("reference", backend):
        torch.manual_seed(0)
        with gp.backend(name):
            value, x = make()
            (grad,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), x)
        results.append((value.detach(), grad.detach(), second))
    return max(((a - b).norm() / a.norm().clamp_min(1e-12)).item() for a, b in zip(*results, strict=True))


def _input(backend: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 3, 9, 7, dtype=dtype, device=registry.home_device(backend)).requires_grad_()


def _check_interpolate(backend: str, dtype: torch.dtype) -> float:
    def make() -> tuple[Tensor, Tensor]:
        x = _input(backend, dtype)
        return gp.interpolate(x, x.detach().flip(0)), x

    return _worst(make, backend)


def _check_perturb(backend: str, dtype: torch.dtype) -> float:
    def make() -> tuple[Tensor, Tensor]:
        x = _input(backend, dtype)
        return gp.perturb(x, scale=0.5, relative=True), x

    return _worst(make, backend)


def _check_grad_norm_penalty(backend: str, dtype: torch.dtype) -> float:
    def make() -> tuple[Tensor, Tensor]:
        x = _input(backend, dtype)
        return gp.grad_norm_penalty(x, form="two_sided", reduction="none"), x

    return _worst(make, backend)


def _check_pairwise_cost(backend: str, dtype: torch.dtype) -> float:
    def make() -> tuple[Tensor, Tensor]:
        x = _input(backend, dtype)
        losses = (x.square().mean((1, 2, 3)), x.pow(3).sum((1, 2, 3)))
        return torch.stack(gp.pairwise_cost(x.detach(), x.detach().flip(0), *losses, margin=0.1, slope=-0.5)), x

    return _worst(make, backend)


def _check_spectral_norm(backend: str, dtype: torch.dtype) -> float:
    def make() -> tuple[Tensor, Tensor]:
        x = _input(backend, dtype)
        u, v = (torch.nn.functional.normalize(x.new_ones(size), dim=0) for size in (3, x.numel() // 3))
        return gp.spectral_normalize(x, u, v, dim=1, n_power_iterations=2), x

    return _worst(make, backend)


_CHECKS = {
    "interpolate": _check_interpolate,
    "perturb": _check_perturb,
    "grad_norm_penalty": _check_grad_norm_penalty,
    "pairwise_cost": _check_pairwise_cost,
    "spectral_norm": _check_spectral_norm,
}
