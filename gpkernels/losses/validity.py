"""Whether an f and a g can work, verified numerically (Dong and Yang 2019, Theorem 5).

With gamma = p_data / (p_data + p_model) at a point, the best critic gains psi(gamma) = max_y Psi(gamma, y) there, where
Psi(gamma, y) = gamma f(y) + (1 - gamma) g(y). A loss is valid if psi is least at gamma = 1/2 alone. Sufficient are

    f'' + g'' <= 0 everywhere, and some y* with f(y*) = g(y*) and f'(y*) = -g'(y*) != 0

since then psi(1/2) = f(y*), while at any other gamma Psi equals f(y*) at y* too and has a slope there. The conditions
are checked on a grid of [-1e8, 1e8], fine within +-20, and psi at steps of gamma of 1e-3 about 1/2.

psi is convex, a maximum of functions linear in gamma, and gamma is 1/2 on average over the samples of both sides. So
the critic's gain over all samples is least only for p_data = p_model if and only if psi(1/2) is finite and psi is not
linear across 1/2: weaker than validity, and called `mean_valid` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkernels._checks import check_number, fail
from gpkernels.losses.components import Component
from gpkernels.losses.framework import as_component

Function = Callable[[Tensor], Tensor]

_STEP = 1e-3  # of gamma, about 1/2
_FAR, _BEYOND = 1e4, 1e8  # a Psi that grows from one to the other, and is greatest there, is taken for unbounded


@dataclass(frozen=True)
class Validity:
    """What `examine` found. `valid`: psi is least at 1/2 alone; `reasons` says what speaks against it, if anything."""

    concave: bool  # f'' + g'' <= 0
    y_star: float | None
    slope: float | None  # f'(y*)
    least: tuple[float, float] | None  # the gammas where psi is least; None: it is infinite at every gamma looked at
    finite: bool  # psi(1/2) is
    valid: bool
    mean_valid: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    """epsilon f and g on the grid `y`, with slopes; points where one is not finite are left out."""

    f: Function
    g: Function
    y: Tensor
    values: tuple[Tensor, Tensor]
    slopes: tuple[Tensor, Tensor]
    scale: float  # the usual |f'| + |g'|, to which differences are compared


def examine(f: str | Component | Function, g: str | Component | Function, *, epsilon: float = 1.0) -> Validity:
    """Verifies the conditions for epsilon f and g, given as `compose` takes them.

    Raises ValueError where f or g has no finite value, and TypeError or ValueError for arguments of the wrong kind.
    """
    pair = _on_grid(f, g, epsilon)
    bend = _bend(pair)
    y_star, slope, obstacle = _crossing(pair)
    reasons = [reason for reason in (bend, obstacle) if reason]
    about_half = torch.tensor([0.5 - _STEP, 0.5 + _STEP, 0.5], dtype=torch.float64)
    beside, middle = _psi(pair, about_half).split([2, 1])
    margin = 1e-12 * pair.scale
    least = _least(pair)
    finite, alone = bool(middle.isfinite()), bool((beside > middle + margin).all())
    if not finite:
        reasons.append("psi(1/2) is infinite: the critic gains without bound where p_data = p_model")
    elif not alone and least is not None:
        reasons.append(f"psi is least at gamma = {span(least)}")
    return Validity(
        concave=not bend,
        y_star=y_star,
        slope=slope,
        least=least,
        finite=finite,
        valid=finite and alone,
        mean_valid=finite and bool(beside.mean() > middle + margin),
        reasons=tuple(reasons),
    )


def psi(f: str | Component | Function, g: str | Component | Function, gamma: Tensor, *, epsilon: float = 1.0) -> Tensor:
    """psi(gamma) = max_y gamma epsilon f(y) + (1 - gamma) g(y), for `gamma` (N,): float64, inf where unbounded."""
    return _psi(_on_grid(f, g, epsilon), gamma.to(torch.float64))


def _psi(pair: _Pair, gamma: Tensor) -> Tensor:
    gamma = gamma.unsqueeze(1)
    grid = _grid()
    gain = _gain(pair, gamma, grid)
    near = gain[:, grid.abs() <= _FAR].amax(1)
    best, place = gain.max(1)
    at_an_end = (place == 0) | (place == len(grid) - 1)
    infinite = at_an_end & (best - near > 0.05 * pair.scale)
    low, high = grid[(place - 1).clamp_min(0)], grid[(place + 1).clamp_max(len(grid) - 1)]
    for _ in range(4):  # each look is 20 times finer
        looks = torch.lerp(low.unsqueeze(1), high.unsqueeze(1), torch.linspace(0, 1, 41, dtype=torch.float64))
        values, place = _gain(pair, gamma, looks).max(1)
        best = torch.maximum(best, values)
        low, high = (looks.gather(1, (place + d).clamp(0, 40).unsqueeze(1)).squeeze(1) for d in (-1, 1))
    return torch.where(infinite, math.inf, best)


def _gain(pair: _Pair, gamma: Tensor, y: Tensor) -> Tensor:
    """Psi(gamma, y), -inf where it is not a number. `gamma` (N, 1), `y` (M,) or (N, M)."""
    with torch.no_grad():
        gain = gamma * pair.f(y) + (1 - gamma) * pair.g(y)
    return torch.where(gain.isnan(), -math.inf, gain)


def _grid() -> Tensor:
    """Symmetric; multiples of 1/100 up to 20, so that the usual kinks are on it, then ever coarser ones to 1e8."""
    far = torch.logspace(math.log10(20), math.log10(_BEYOND), 400, dtype=torch.float64)[1:]
    return torch.cat([-far.flip(0), torch.arange(-2000, 2001, dtype=torch.float64) / 100, far])


def _on_grid(f: str | Component | Function, g: str | Component | Function, epsilon: float) -> _Pair:
    if check_number("epsilon", epsilon) <= 0:
        raise fail("epsilon", "a number > 0", epsilon)
    first, second = as_component("f", f).function, as_component("g", g).function
    functions = (lambda y: epsilon * first(y)), second
    y = _grid()
    found = [_with_slope(side, function, y) for side, function in zip("fg", functions, strict=True)]
    keep = torch.stack([part.isfinite() for pair in found for part in pair]).all(0)
    if keep.sum() < 3:
        raise fail("f, g", "finite values and slopes somewhere between -1e8 and 1e8", "none")
    (f_y, df), (g_y, dg) = ([part[keep] for part in pair] for pair in found)
    y, size = y[keep], df.abs() + dg.abs()
    near = (y.abs() <= 1) & (size > 0)
    usual = size[near if near.any() else size > 0]
    scale = usual.median().item() if len(usual) else 1.0
    return _Pair(*functions, y, (f_y, g_y), (df, dg), scale)


def _with_slope(side: str, function: Function, y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.detach().requires_grad_()
    with torch.enable_grad():
        value = function(y)
    if not isinstance(value, Tensor) or value.shape != y.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise fail(side, f"a value a score, shape {tuple(y.shape)}", got)
    if not value.requires_grad:
        return value, torch.zeros_like(value)
    (slope,) = torch.autograd.grad(value, y, torch.ones_like(value))
    return value.detach(), slope


def _bend(pair: _Pair) -> str:
    """Where f' + g' rises most steeply, in words; "" where it never rises."""
    total = pair.slopes[0] + pair.slopes[1]
    size = torch.maximum(total[1:].abs(), total[:-1].abs())
    rises = total.diff() > 1e-9 * pair.scale + 1e-12 * size
    if not rises.any():
        return ""
    bend = torch.where(rises, total.diff() / pair.y.diff(), 0.0)
    steepest = bend >= 0.99 * bend.max()
    at = torch.where(steepest, pair.y[:-1].abs(), math.inf).argmin()
    return f"f'' + g'' > 0 at y = {pair.y[at]:.4g}: f' + g' rises from {total[at]:.4g} to {total[at + 1]:.4g} there"


def _crossing(pair: _Pair) -> tuple[float | None, float | None, str]:
    """(y*, f'(y*), ""), or (None, None, the reason) for the place that comes nearest."""
    gap = pair.values[0] - pair.values[1]
    turns = gap[1:].sign() * gap[:-1].sign() < 0
    low, high = pair.y[:-1][turns], pair.y[1:][turns]
    at_low = gap[:-1][turns].sign()
    for _ in range(100):
        middle = (low + high) / 2
        same = (pair.f(middle) - pair.g(middle)).sign() == at_low
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    places = torch.cat([pair.y[gap == 0], high])
    if not len(places):
        return None, None, "f and g are equal nowhere"
    places = places[places.abs().argsort(stable=True)]
    (f_y, df), (g_y, dg) = (_with_slope(side, fn, places) for side, fn in (("f", pair.f), ("g", pair.g)))
    size = df.abs() + dg.abs()
    meets = (f_y - g_y).abs() <= 1e-6 * pair.scale + 1e-12 * f_y.abs()
    balanced = (df + dg).abs() <= 1e-6 * size
    sloped = df.abs() > 1e-9 * pair.scale
    kinked = [_kinks(side, fn, places, size, 1e-2 * pair.scale) for side, fn in (("f", pair.f), ("g", pair.g))]
    good = meets & balanced & sloped & ~kinked[0] & ~kinked[1]
    if good.any():
        first = int(good.nonzero()[0])
        return places[first].item() + 0.0, df[first].item(), ""
    nearest = int(torch.where(meets, (df + dg).abs() / size.clamp_min(1e-300), math.inf).argmin())
    where = f"at y = {places[nearest].item() + 0.0:.4g}, where f = g, "
    if not meets[nearest]:
        return None, None, f"f and g are equal nowhere: they jump past each other at y = {places[nearest].item():.4g}"
    for name, kink in zip("fg", kinked, strict=True):
        if kink[nearest]:
            return None, None, where + f"{name} has a kink"
    if not balanced[nearest]:
        return None, None, where + f"f' + g' = {(df + dg)[nearest].item():.4g}, not 0"
    return None, None, where + "f' = g' = 0, a slope was wanted"


def _kinks(side: str, function: Function, y: Tensor, size: Tensor, least: float) -> Tensor:
    """Where the slope jumps."""
    step = 1e-6 * (1 + y.abs())
    before, after = (_with_slope(side, function, y + sign * step)[1] for sign in (-1, 1))
    return (after - before).abs() > 1e-3 * size.clamp_min(least)


def _least(pair: _Pair) -> tuple[float, float] | None:
    low, high = 0.0, 1.0
    for _ in range(3):
        gamma = torch.linspace(low, high, 41, dtype=torch.float64)
        value = _psi(pair, gamma)
        if not value.isfinite().any():
            return None
        at_least = gamma[value <= value.min() + 1e-10 * pair.scale]
        first, last, step = at_least[0].item(), at_least[-1].item(), (high - low) / 40
        if last - first > 3 * step:
            return first, last
        low, high = max(0.0, first - step), min(1.0, last + step)
    return ((first + last) / 2,) * 2


def span(least: tuple[float, float]) -> str:
    low, high = (round(end, 3) for end in least)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
