"""Presets: named settings, each with its source. Settings not listed keep TrainConfig's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gpkernels._checks import check_choice
from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig


@dataclass(frozen=True)
class Preset:
    doc: str
    settings: Mapping[str, Any]


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "ls-gan-pg": Preset(
            "LS-GAN with a gradient penalty at real points, DCGAN critic without norm layers "
            "(Qi 2020 and its public code)",
            {},
        ),
        "ls-gan-pg-mini": Preset(
            "ls-gan-pg sized for lfw-mini on two CPU cores: narrow nets, small batches, a higher learning rate",
            {"ngf": 16, "ndf": 16, "batch_size": 16, "lr": 5e-4, "ema": 0.998, "epochs": 40},
        ),
        "ls-gan-pg-cost-model": Preset(
            "LS-GAN-PG with the cost model of the LS-GAN poster: five convolutions with BN and ReLU between them",
            {"critic": "cost-model", "epochs": 24},
        ),
        "ls-gan": Preset(
            "LS-GAN without a penalty, on the cost model (Qi 2020)",
            {"critic": "cost-model", "penalty": "none", "lr": 1e-4},
        ),
    }
)


def from_preset(name: str, overrides: Mapping[str, Any]) -> TrainConfig:
    """The preset's config with settings overridden."""
    try:
        check_choice("--preset", name, PRESETS)
    except ValueError as error:
        raise UserError(str(error)) from None
    return TrainConfig(**{**PRESETS[name].settings, **overrides, "preset": name})
