"""The kinds of gradient penalty, weight * E_x R(||grad_x D(x)||), as a table: where x lies and what R is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkernels._checks import check_choice, check_number, fail
from gpkernels.functional import interpolate, perturb
from gpkernels.ops.perturb.reference import NOISES


@dataclass(frozen=True)
class Draw:
    """What decides x beside the samples: arguments of `gradient_penalty`."""

    eps: Tensor | None = None
    per_element: bool = False
    noise: str | None = None
    scale: float | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Kind:
    """`point(real, fake, draw)` gives x; `form` and `factor` are R's usual form and its factor."""

    name: str
    point: Callable[[Any, Any, Draw], Tensor]  # of real and fake, those that it needs are tensors
    form: str
    factor: float
    inputs: tuple[str, ...]  # of real and fake, which it needs
    at_samples: bool  # x is a batch of samples itself, so a forward of the critic on it can be shared
    doc: str


DRAGAN_SCALE = 0.5
"""The usual scale of kind "local" with uniform noise, in standard deviations of the real batch."""


def _coupled(real: Tensor, fake: Tensor, draw: Draw) -> Tensor:
    return interpolate(real, fake, eps=draw.eps, per_element=draw.per_element, generator=draw.generator)


def _local(real: Tensor, fake: object, draw: Draw) -> Tensor:
    if draw.noise == "normal":
        assert draw.scale is not None
        return perturb(real, scale=draw.scale, noise="normal", generator=draw.generator)
    scale = DRAGAN_SCALE if draw.scale is None else draw.scale
    return perturb(real, scale=scale, noise="uniform", relative=True, generator=draw.generator)


def _at_real(real: Tensor, fake: object, draw: Draw) -> Tensor:
    return real


def _at_fake(real: object, fake: Tensor, draw: Draw) -> Tensor:
    return fake


KINDS = {
    row.name: row
    for row in (
        Kind(
            "coupled",
            _coupled,
            "two_sided",
            1.0,
            ("real", "fake"),
            False,
            "WGAN-GP: between real and fake pairs (Gulrajani et al. 2017, eq. 3)",
        ),
        Kind(
            "local",
            _local,
            "two_sided",
            1.0,
            ("real",),
            False,
            "DRAGAN: around real samples, noise on both sides of them (Kodali et al. 2017, section 2.3)",
        ),
        Kind(
            "r1",
            _at_real,
            "squared",
            0.5,
            ("real",),
            True,
            "R1: at real samples, half the squared norm (Mescheder et al. 2018, eq. 9)",
        ),
        Kind(
            "r2",
            _at_fake,
            "squared",
            0.5,
            ("fake",),
            True,
            "R2: at fake samples, half the squared norm (Mescheder et al. 2018, eq. 10)",
        ),
        Kind(
            "ls_gan_pg",
            _at_real,
            "linear",
            1.0,
            ("real",),
            True,
            "LS-GAN-PG: at real samples, the norm itself (Qi 2020, the gradient-penalised LS-GAN)",
        ),
    )
}


def check_inputs(kind: Kind, given: dict[str, object]) -> None:
    """The samples that `kind` needs are there."""
    for name in kind.inputs:
        if given[name] is None:
            raise fail(name, f"a tensor, which kind {kind.name!r} needs", "None")


def check_draw(kind: Kind, draw: Draw) -> None:
    """Nothing is given that `kind` would ignore, and what is given makes sense."""
    if draw.eps is not None and kind.name != "coupled":
        raise fail("eps", f"None for kind {kind.name!r} (only 'coupled' interpolates)", "a value")
    if draw.per_element and kind.name != "coupled":
        raise fail("per_element", f"False for kind {kind.name!r} (only 'coupled' interpolates)", draw.per_element)
    for name in ("noise", "scale"):
        if getattr(draw, name) is not None and kind.name != "local":
            raise fail(name, f"None for kind {kind.name!r} (only 'local' perturbs)", getattr(draw, name))
    if draw.noise is not None:
        check_choice("noise", draw.noise, NOISES)
    if draw.scale is not None:
        check_number("scale", draw.scale, minimum=0)
    elif draw.noise == "normal":
        raise fail("scale", "a number for noise 'normal', whose size is its own", "None")
