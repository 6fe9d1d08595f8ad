"""Adversarial losses: the f, g, h framework as a table (LOSSES), the loss-sensitive family (LossSensitive, class_loss),
losses composed from a user's own functions (compose), and the check whether an f and a g can work (examine)."""

from gpkernels.losses.components import COMPONENTS, Component
from gpkernels.losses.framework import Loss, compose
from gpkernels.losses.sensitive import CriticTerms, LossSensitive, class_loss, presume_labels
from gpkernels.losses.table import LOSSES, loss
from gpkernels.losses.validity import Validity, examine

__all__ = [
    "COMPONENTS",
    "LOSSES",
    "Component",
    "CriticTerms",
    "Loss",
    "LossSensitive",
    "Validity",
    "class_loss",
    "compose",
    "examine",
    "loss",
    "presume_labels",
]
