"""The kinds of gradient penalty, weight * E_x R(||grad_x D(x)||), as a table: where x lies and what R is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkernels._checks import check_number, fail
from gpkernels.functional import interpolate, perturb


@dataclass(frozen=True)
class Kind:
    """`point(real, fake, eps, per_element, scale, generator)` gives x; `form` and `factor` are R's usual form and its
    factor."""

    name: str
    point: Callable[..., Tensor]
    form: str
    factor: float
    inputs: tuple[str, ...]  # of real and fake, which it needs
    at_samples: bool  # x is a batch of samples itself, so a forward of the critic on it can be shared
    doc: str


DRAGAN_SCALE = 0.5
"""The usual scale of kind "local", in standard deviations of the real batch."""


def _coupled(
    real: Tensor,
    fake: Tensor,
    eps: Tensor | None,
    per_element: bool,
    scale: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    return interpolate(real, fake, eps=eps, per_element=per_element, generator=generator)


def _local(
    real: Tensor,
    fake: Tensor,
    eps: Tensor | None,
    per_element: bool,
    scale: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    scale = DRAGAN_SCALE if scale is None else scale
    return perturb(real, scale=scale, noise="uniform", relative=True, generator=generator)


def _at_real(real: Tensor, fake: Tensor, *unused: object) -> Tensor:
    return real


def _at_fake(real: Tensor, fake: Tensor, *unused: object) -> Tensor:
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
            "DRAGAN: around real samples, uniform noise on [-1, 1) (Kodali et al. 2017, section 2.3)",
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


def check_options(kind: Kind, *, eps: Tensor | None, per_element: bool, scale: float | None) -> None:
    """None of these is given that `kind` would ignore."""
    if eps is not None and kind.name != "coupled":
        raise fail("eps", f"None for kind {kind.name!r} (only 'coupled' interpolates)", "a value")
    if per_element and kind.name != "coupled":
        raise fail("per_element", f"False for kind {kind.name!r} (only 'coupled' interpolates)", per_element)
    if scale is not None:
        check_number("scale", scale, minimum=0)
        if kind.name != "local":
            raise fail("scale", f"None for kind {kind.name!r} (only 'local' perturbs)", scale)
