"""Argument checks: every message names the argument, what was wanted and what was got."""

import math
from collections.abc import Iterable
from typing import Any

import torch


def fail(name: str, wanted: str, got: Any) -> ValueError:
    return ValueError(f"{name}: wanted {wanted}, got {got}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    options = list(choices)
    if value not in options:
        raise fail(name, "one of " + ", ".join(map(repr, options)), repr(value))


def check_number(name: str, value: Any, *, minimum: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: wanted a number, got {type(value).__name__}")
    if not math.isfinite(value) or (minimum is not None and value < minimum):
        wanted = "a finite number" if minimum is None else f"a finite number >= {minimum:g}"
        raise fail(name, wanted, value)
    return float(value)


def check_count(name: str, value: Any, *, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: wanted a whole number, got {type(value).__name__}")
    if value < minimum:
        raise fail(name, f"a whole number >= {minimum}", value)
    return value


def check_floating(name: str, x: Any) -> None:
    """`x` is a real floating-point tensor with a batch dimension and at least one element."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: wanted a torch.Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: wanted a floating-point tensor, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: wanted a dense (strided) tensor, got {x.layout}")
    if x.dim() == 0:
        raise fail(name, "a batch dimension", "a tensor of shape ()")
    if x.numel() == 0:
        raise fail(name, "a non-empty batch", f"shape {tuple(x.shape)}")


def check_same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if x.shape == other.shape and x.dtype == other.dtype and x.device == other.device:
        return
    for what, a, b in (
        ("shape", tuple(x.shape), tuple(other.shape)),
        ("dtype", x.dtype, other.dtype),
        ("device", x.device, other.device),
    ):
        if a != b:
            raise fail(name, f"the {what} of {other_name}, {b}", a)
