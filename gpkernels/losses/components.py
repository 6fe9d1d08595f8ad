"""The functions of a score that adversarial losses are made of. Each is named after its formula.

log sigma(y) is -softplus(-y), computed without overflow for any y; sigma is never formed. At a kink the derivative is
that of torch's relu and abs, 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Component:
    """`function` maps scores of any shape and floating dtype to values of that shape, element by element."""

    name: str
    function: Callable[[Tensor], Tensor]
    doc: str = ""


_ROWS = (
    Component("0", torch.zeros_like, "nothing: the samples on this side do not count"),
    Component("y", lambda y: y, "the score, without bound"),
    Component("-y", lambda y: -y, "the negative score, without bound"),
    Component("-softplus(-y)", lambda y: F.logsigmoid(y), "log sigma(y), at most 0"),
    Component("-softplus(y)", lambda y: F.logsigmoid(-y), "log(1 - sigma(y)), at most 0: slope 0 at low scores"),
    Component("softplus(-y)", lambda y: -F.logsigmoid(y), "-log sigma(y): slope -1 at low scores"),
    Component("-(y - 1)^2", lambda y: -(y - 1).square(), "the squared distance to 1, negative"),
    Component("-y^2", lambda y: -y.square(), "the squared distance to 0, negative"),
    Component("(y - 1)^2", lambda y: (y - 1).square(), "the squared distance to 1"),
    Component("min(0, y - 1)", lambda y: -F.relu(1 - y), "flat above 1"),
    Component("min(0, -y - 1)", lambda y: -F.relu(1 + y), "flat below -1"),
    Component("max(0, 1 - y)", lambda y: F.relu(1 - y), "flat above 1"),
    Component("-abs(1 - y)", lambda y: -(1 - y).abs(), "the distance to 1, negative"),
    Component("-abs(y)", lambda y: -y.abs(), "the distance to 0, negative"),
    Component("abs(1 - y)", lambda y: (1 - y).abs(), "the distance to 1"),
)

COMPONENTS: Mapping[str, Component] = MappingProxyType({row.name: row for row in _ROWS})
"""Every f, g and h of the table of losses, by name."""
