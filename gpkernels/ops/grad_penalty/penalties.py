"""The penalties phi(n) on a gradient norm n >= 0: one row each, with first and second derivative.

`csrc/penalty_math.h` holds the same rows in the same order for the native kernels. A row added with `register`
works at once everywhere through the reference; native kernels serve the rows they know.

phi' and phi'' are one-sided where phi has a kink: at n = k the flat side's slope is taken for `one_sided_linear`
and `maximum` (as torch's relu does), the curved side's for `one_sided`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Row = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Penalty:
    """phi(n, k) for norms n (any shape) and a target k >= 0; `d` and `d2` are its derivatives in n."""

    name: str
    phi: Row
    d: Row
    d2: Row
    doc: str


def _zero(n: Tensor, k: float) -> Tensor:
    return torch.zeros_like(n)


def _one(n: Tensor, k: float) -> Tensor:
    return torch.ones_like(n)


def _two(n: Tensor, k: float) -> Tensor:
    return torch.full_like(n, 2.0)


def _above(n: Tensor, k: float) -> Tensor:
    return (n > k).to(n.dtype)


_NATIVE_ROWS = (
    Penalty(
        "two_sided",
        lambda n, k: (n - k).square(),
        lambda n, k: 2 * (n - k),
        _two,
        "(n - k)^2, pulls the norm to k (Gulrajani et al. 2017, eq. 3)",
    ),
    Penalty(
        "one_sided",
        lambda n, k: (n - k).clamp_min(0).square(),
        lambda n, k: 2 * (n - k).clamp_min(0),
        lambda n, k: 2 * (n >= k).to(n.dtype),
        "max(0, n - k)^2, only norms above k pay (Petzka et al. 2018, eq. 8)",
    ),
    Penalty(
        "one_sided_linear",
        lambda n, k: (n - k).clamp_min(0),
        _above,
        _zero,
        "max(0, n - k)",
    ),
    Penalty(
        "maximum",
        lambda n, k: n.clamp_min(k),
        _above,
        _zero,
        "max(n, k), the one-sided penalty of Dong and Yang 2019; the gradient of one_sided_linear",
    ),
    Penalty(
        "linear",
        lambda n, k: n,
        _one,
        _zero,
        "n, the gradient norm itself (LS-GAN-PG)",
    ),
    Penalty(
        "squared",
        lambda n, k: n.square(),
        lambda n, k: 2 * n,
        _two,
        "n^2 (Mescheder et al. 2018, eq. 9, who halve it)",
    ),
)

PENALTIES: dict[str, Penalty] = {row.name: row for row in _NATIVE_ROWS}
"""The table, by name. A raw op takes the position of a row."""

NATIVE_COUNT = len(_NATIVE_ROWS)
"""Rows that the native kernels know: the first of the table."""

_ORDER: list[Penalty] = list(_NATIVE_ROWS)
_CODES: dict[str, int] = {row.name: code for code, row in enumerate(_ORDER)}


def register(row: Penalty) -> None:
    """Adds a penalty to the table. Raises ValueError if the name is taken."""
    if row.name in PENALTIES:
        raise ValueError(f"name: wanted a new one, got {row.name!r}, which is taken")
    PENALTIES[row.name] = row
    _CODES[row.name] = len(_ORDER)
    _ORDER.append(row)


def code_of(name: str) -> int:
    return _CODES[name]


def row_of(code: int) -> Penalty:
    return _ORDER[code]


def d_over_n(row: Penalty, n: Tensor, k: float) -> Tensor:
    """phi'(n)/n, the factor of g in the gradient of phi(||g||_2).

    At n = 0 the norm has no gradient, which is 0 by definition, unless phi'(0) = 0: then phi(||g||) is smooth at
    g = 0 and the factor is its limit phi''(0).
    """
    d = row.d(n, k)
    at_zero = torch.where(d == 0, row.d2(n, k), 0.0)
    return torch.where(n != 0, d / torch.where(n != 0, n, 1.0), at_zero)
