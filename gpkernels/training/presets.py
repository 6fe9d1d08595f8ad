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
    source: str
    settings: Mapping[str, Any]


_NO_PENALTY = {"penalty": "none", "penalty_axes": "sample"}
_BATCH_NORM = {"critic_norm": "batch"}
_MINI = {"ngf": 16, "ndf": 16, "batch_size": 16, "lr": 5e-4, "ema": 0.998, "epochs": 40}
_GULRAJANI = {"critic_steps": 5, "fresh_z": True, "lr": 1e-4, "beta1": 0.0, "beta2": 0.9}
_MESCHEDER = {"loss": "classic-non-saturating", "optimizer": "rmsprop", "lr": 1e-4, "fresh_z": True}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "ls-gan-pg": Preset(
            "LS-GAN with a gradient penalty at real points, DCGAN critic without norm layers",
            "Qi 2020 (IJCV) and its public code",
            {},
        ),
        "ls-gan-pg-mini": Preset(
            "ls-gan-pg sized for lfw-mini on two CPU cores: narrow nets, small batches, a higher learning rate",
            "this project",
            _MINI,
        ),
        "ls-gan-pg-cost-model": Preset(
            "ls-gan-pg with five convolutions as the critic, BN and ReLU between them",
            "the LS-GAN poster",
            {"critic": "cost-model", "epochs": 24},
        ),
        "ls-gan": Preset(
            "LS-GAN without a penalty, critic with BN",
            "Qi 2020 (IJCV), section 7; its final ReLU is left out, with which L died to a constant",
            {**_NO_PENALTY, "critic": "cost-model", "lr": 1e-4, "z": "uniform"},
        ),
        "gls-gan": Preset(
            "LS-GAN's cost with a slope where the margin is kept, between LS-GAN (0) and WGAN (1)",
            "Qi 2020 (IJCV), eq. 16; the slope 0.01 is this project's",
            {**_NO_PENALTY, "critic": "cost-model", "lr": 1e-4, "z": "uniform", "loss": "gls-gan", "slope": 0.01},
        ),
        "cls-gan": Preset(
            "conditional LS-GAN: the critic is a classifier; with --labels N semi-supervised",
            "Qi 2020 (IJCV), section 6 and its public code",
            {
                **_NO_PENALTY,
                "loss": "cls-gan",
                "condition": "classes",
                "critic_norm": "batch",
                "data": "fashion-mnist",
                "gamma": 1.0,
                "margin": 8e-4,
                "lr": 1e-3,
                "flip": False,
            },
        ),
        "gan": Preset(
            "the first GAN, minimax: the generator's loss saturates",
            "Goodfellow et al. 2014, eq. 1, with DCGAN's nets",
            {**_NO_PENALTY, **_BATCH_NORM, "loss": "classic-minimax"},
        ),
        "gan-ns": Preset(
            "the non-saturating GAN",
            "Goodfellow et al. 2014, section 3, with DCGAN's nets",
            {**_NO_PENALTY, **_BATCH_NORM, "loss": "classic-non-saturating"},
        ),
        "dcgan": Preset(
            "gan-ns with DCGAN's batches and uniform z",
            "Radford et al. 2016, section 4",
            {**_NO_PENALTY, **_BATCH_NORM, "loss": "classic-non-saturating", "batch_size": 128, "z": "uniform"},
        ),
        "lsgan-least-squares": Preset(
            "least squares GAN (not loss-sensitive), for any folder of images",
            "Mao et al. 2017; settings of DCGAN",
            {**_NO_PENALTY, **_BATCH_NORM, "loss": "least-squares"},
        ),
        "wgan": Preset(
            "the first WGAN: weights clipped to [-0.01, 0.01]",
            "Arjovsky et al. 2017, Algorithm 1",
            {
                **_NO_PENALTY,
                **_BATCH_NORM,
                "loss": "wasserstein",
                "clip": 0.01,
                "optimizer": "rmsprop",
                "lr": 5e-5,
                "critic_steps": 5,
                "fresh_z": True,
            },
        ),
        "wgan-gp": Preset(
            "WGAN with a two-sided penalty between real and generated images",
            "Gulrajani et al. 2017, Algorithm 1",
            {**_GULRAJANI, "loss": "wasserstein", "penalty": "coupled", "penalty_axes": "sample"},
        ),
        "dragan": Preset(
            "the GAN with a penalty around real images, noise on both sides",
            "Kodali et al. 2017, section 2.3",
            {"loss": "classic-non-saturating", "penalty": "local", "penalty_axes": "sample", "lr": 1e-4},
        ),
        "r1": Preset(
            "the GAN with half the squared gradient norm at real images",
            "Mescheder et al. 2018, eq. 9",
            {**_MESCHEDER, "penalty": "r1", "penalty_axes": "sample"},
        ),
        "r2": Preset(
            "the GAN with half the squared gradient norm at generated images",
            "Mescheder et al. 2018, eq. 10",
            {**_MESCHEDER, "penalty": "r2", "penalty_axes": "sample"},
        ),
        "sngan": Preset(
            "hinge loss, ResNets, spectral norm",
            "Miyato et al. 2018, section 4 and tables 3 to 6",
            {
                **_NO_PENALTY,
                **_GULRAJANI,
                "lr": 2e-4,
                "loss": "hinge",
                "generator": "resnet",
                "critic": "resnet",
                "nz": 128,
                "spectral_norm": True,
            },
        ),
        "cgan": Preset(
            "the conditional GAN: one-hot labels beside z and image",
            "Mirza and Osindero 2014, with DCGAN's nets",
            {
                **_NO_PENALTY,
                **_BATCH_NORM,
                "loss": "classic-non-saturating",
                "condition": "concat",
                "data": "fashion-mnist",
                "flip": False,
            },
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
