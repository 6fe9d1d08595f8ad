"""Which implementation an op uses, and why the others are not used.

A row is one op on one backend. `choose` walks the device's backends in order of preference and takes the first
whose row supports the call. Inside `with backend(name):` only that backend is tried: an explicit request never
falls back, it raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpkernels import _support
from gpkernels._checks import check_choice

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""Every backend name, whether or not this build has it."""

PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
"""Backends by device type, the preferred one first. Devices not listed use the reference."""


@dataclass(frozen=True)
class Implementation:
    """One op on one backend.

    `supports(tensor, **options)` returns `(ok, reason)`; the reason is for people and is empty when ok.
    `forward`, `backward` and `double_backward` have the signatures of the raw ops of that name. Of an op that keeps a
    state between calls (spectral_norm), `iterate` moves it, and `update` does so and computes forward's result.
    """

    op: str
    backend: str
    supports: Callable[..., tuple[bool, str]]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    double_backward: Callable[..., Any] | None = None
    iterate: Callable[..., Any] | None = None
    update: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, BACKENDS)


_rows: dict[tuple[str, str], Implementation] = {}
_requested: list[str] = []
_chosen: dict[tuple[Any, ...], Implementation] = {}  # past answers of choose, which runs at every call of an op


class BackendError(RuntimeError):
    """The backend asked for with `gpkernels.backend` cannot run this call."""


def register(row: Implementation) -> None:
    key = (row.op, row.backend)
    if key in _rows:
        raise ValueError(f"backend: {row.op} already has a {row.backend} implementation")
    _rows[key] = row
    _chosen.clear()


def ops() -> tuple[str, ...]:
    return tuple(dict.fromkeys(op for op, _ in _rows))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use only this backend inside the `with` block: "reference", "cpu", "triton" or "cuda".

    The choice is made when an op runs forward and is kept for its backward. It never falls back: a call the
    backend cannot run raises `BackendError` with the reason that `why_not` gives. The request is process-wide.
    Raises ValueError for an unknown name.
    """
    check_choice("backend", name, BACKENDS)
    _requested.append(name)
    try:
        yield
    finally:
        _requested.pop()


def allows(name: str) -> bool:
    """Whether backend `name` may be used: no other has been asked for."""
    return not _requested or _requested[-1] == name


def reason_against(op: str, name: str, tensor: torch.Tensor, **options: Any) -> str:
    """Why backend `name` cannot run this call of `op`; empty when it can."""
    row = _rows.get((op, name))
    if row is None:
        return f"{op} has no {name} implementation in this version"
    ok, reason = row.supports(tensor, **options)
    return "" if ok else reason


def choose(op: str, tensor: torch.Tensor, **options: Any) -> Implementation:
    """The implementation that `op` uses for a call on `tensor`, now.

    `options` are what `supports` of the op's rows asks about.
    """
    if _requested or _support.under_transform() or torch.compiler.is_compiling():
        return _choose(op, tensor, options)
    key = (op, tensor.device, tensor.dtype, *options.values())
    row = _chosen.get(key)
    if row is None:
        row = _chosen[key] = _choose(op, tensor, options)
    return row


def _choose(op: str, tensor: torch.Tensor, options: dict[str, Any]) -> Implementation:
    if _requested:
        name = _requested[-1]
        reason = reason_against(op, name, tensor, **options)
        if reason:
            raise BackendError(f"{op}: backend {name!r} was requested but cannot run this call: {reason}")
        return _rows[op, name]
    for name in PREFERENCE.get(tensor.device.type, ("reference",)):
        row = _rows.get((op, name))
        if row is not None and row.supports(tensor, **options)[0]:
            return row
    raise BackendError(f"{op}: no backend can run this call")


def home_device(name: str) -> str:
    """The type of the tensors that backend `name` is made for."""
    if name == "triton" and _support.interprets_triton():
        return "cpu"
    return "cuda" if name in ("triton", "cuda") else "cpu"


def why_not(name: str, op: str | None = None, *, device: str | None = None) -> str | None:
    """Why backend `name` is not usable here, in words; None when it is.

    Asks about float32 tensors on `device` (default: the backend's own device) for one op or, by default, all.
    """
    check_choice("backend", name, BACKENDS)
    if op is not None:
        check_choice("op", op, ops())
    device = device or home_device(name)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        no_gpu = "torch sees no CUDA device (torch.cuda.is_available() is False)"
        probe = torch.empty(1, device="meta")
    else:
        no_gpu = ""
        probe = torch.empty(1, device=device)
    reasons: dict[str, None] = {}
    for each in (op,) if op else ops():
        if (each, name) not in _rows:
            reasons[reason_against(each, name, probe)] = None
        elif no_gpu:
            reasons[no_gpu] = None
        elif reason := reason_against(each, name, probe):
            reasons[reason] = None
    return "; ".join(reasons) or None
