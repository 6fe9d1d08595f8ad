"""The adversarial losses by name. A new one is one row; `gpkernels losses` prints the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from gpkernels._checks import check_choice
from gpkernels.losses.framework import Loss, compose

_GOODFELLOW = "Goodfellow et al. 2014"
_HINGE = "Lim and Ye 2017, Miyato et al. 2018"
_RELATIVISTIC = "Jolicoeur-Martineau 2019; public code often halves it"
_SP, _SP_NEGATIVE = "-softplus(-y)", "-softplus(y)"
_HINGES = ("min(0, y - 1)", "min(0, -y - 1)")

_ROWS = (
    compose("classic-minimax", _SP, _SP_NEGATIVE, _SP_NEGATIVE, doc=f"the zero-sum game, saturating ({_GOODFELLOW})"),
    compose("classic-non-saturating", _SP, _SP_NEGATIVE, "softplus(-y)", doc=f"the usual GAN ({_GOODFELLOW})"),
    compose("classic-linear", _SP, _SP_NEGATIVE, "-y", doc="h is the score itself (Dong and Yang 2019)"),
    compose("wasserstein", "y", "-y", "-y", doc="needs a Lipschitz critic (Arjovsky et al. 2017)"),
    compose(
        "least-squares",
        "-(y - 1)^2",
        "-y^2",
        "(y - 1)^2",
        doc="targets 1 and 0 (Mao et al. 2017, who halve the squares)",
    ),
    compose("hinge", *_HINGES, "-y", doc=f"SNGAN's ({_HINGE})"),
    compose("hinge-non-saturating", *_HINGES, "softplus(-y)", doc="the hinge's critic (Dong and Yang 2019)"),
    compose("hinge-minimax", *_HINGES, "min(0, -y - 1)", doc="the zero-sum hinge (Dong and Yang 2019)"),
    compose(
        "absolute",
        "-abs(1 - y)",
        "-abs(y)",
        "abs(1 - y)",
        doc='targets 1 and 0 (Dong and Yang 2019, "double-absolute" in their code)',
    ),
    compose(
        "asymmetric",
        "-abs(y)",
        "-y",
        "-y",
        doc='real scores at 0, fake ones low (Dong and Yang 2019, "absolute" in their code)',
    ),
    compose(
        "relativistic-average",
        _SP,
        _SP_NEGATIVE,
        "softplus(-y)",
        relation="average",
        doc=f"RaGAN, the classic loss against the other side's mean ({_RELATIVISTIC})",
    ),
    compose(
        "relativistic-average-hinge",
        *_HINGES,
        "max(0, 1 - y)",
        relation="average",
        doc=f"RaHingeGAN ({_RELATIVISTIC})",
    ),
    compose(
        "relativistic-pairing",
        _SP,
        "0",
        "softplus(-y)",
        relation="pair",
        doc="RpGAN, softplus(-(real - fake)) (Jolicoeur-Martineau 2019)",
    ),
)

LOSSES: Mapping[str, Loss] = MappingProxyType({row.name: row for row in _ROWS})
"""The table, by name."""


def loss(name: str, *, epsilon: float = 1.0) -> Loss:
    """The loss called `name`, with f weighed by `epsilon` (Dong and Yang 2019 try 0.5, 0.9, 1.1 and 2).

    Raises ValueError for an unknown name, and for an epsilon that is not positive or, in a relativistic loss, not 1.
    """
    check_choice("name", name, LOSSES)
    return dataclasses.replace(LOSSES[name], epsilon=epsilon)
