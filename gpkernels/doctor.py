"""`gpkernels doctor`: what is built, which backend each op would use and why, and a check that runs each op."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import gpkernels as gp
from gpkernels import _native, registry
from gpkernels.ops.spectral_norm.autograd import spectral_attach, spectral_update


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
    few_channels = f"torch; {_native.missing}" if _native.missing else "cpu for few channels, where it wins, else torch"
    print(f"{_CONVOLUTION}\n  cpu tensors: {few_channels}\n  cuda tensors: torch")
    print("self-check against the reference (float32 and float64: value, first and second derivative)")
    failures = 0
    for op, check in _CHECKS.items():
        for backend in registry.BACKENDS[1:]:
            if not _has_kernel(op, backend):
                continue
            error = max(check(backend, dtype) / tolerance(op, dtype) for dtype in (torch.float32, torch.float64))
            failures += not error <= 1
            print(f"  {op} on {backend}: {'ok' if error <= 1 else 'WRONG'} (worst error {error:.2f} of tolerance)")
    return 1 if failures else 0


def _has_kernel(op: str, backend: str) -> bool:
    """Whether there is one that can run here."""
    if op == _CONVOLUTION:
        return backend == "cpu" and not _native.missing
    return (op, backend) in registry._rows and not registry.why_not(backend, op)


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
        one = gp.spectral_normalize(x, u.clone(), v.clone(), dim=1, n_power_iterations=2)
        (updated,) = spectral_update([x.detach()], [u], [v], [1], [3.0], 2, 1e-12)
        return one + spectral_attach(updated, [x], [3.0], 1e-12)[0], x

    return _worst(make, backend)


def _check_norm_act(backend: str, dtype: torch.dtype) -> float:
    """Statistics of the batch and of groups, without and with an activation."""

    def make() -> tuple[Tensor, Tensor]:
        x = _input(backend, dtype)
        weight, bias = x.new_tensor([0.5, -1.0, 2.0]), x.new_tensor([0.1, 0.0, -0.2])
        with gp.fast_double_backward():
            of_batch = F.leaky_relu(F.batch_norm(x, None, None, weight, bias, training=True), 0.2)
            of_groups = F.group_norm(x, 3, weight, bias)
        return torch.stack([of_batch, of_groups.sin()]), x

    return _worst(make, backend)


def _check_conv2d_input_gradient(backend: str, dtype: torch.dtype) -> float:
    def make() -> tuple[Tensor, Tensor]:
        x = _input(backend, dtype)
        weight = torch.randn(8, 3, 4, 4, dtype=dtype, device=x.device)
        with gp.fast_double_backward():
            return F.conv2d(x, weight, stride=2, padding=1), x

    return _worst(make, backend)


_CONVOLUTION = "conv2d_input_gradient"
_CHECKS = {
    "interpolate": _check_interpolate,
    "perturb": _check_perturb,
    "grad_norm_penalty": _check_grad_norm_penalty,
    "pairwise_cost": _check_pairwise_cost,
    "spectral_norm": _check_spectral_norm,
    "norm_act": _check_norm_act,
    _CONVOLUTION: _check_conv2d_input_gradient,
}
