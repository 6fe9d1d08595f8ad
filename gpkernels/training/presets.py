"""Presets: named settings, each with its source. Settings not listed keep TrainConfig's defaults.

Common to all, whatever the source has: nets of `models` in sizes of 32, 64 and 128 pixels, mirrored images unless a
preset says otherwise, a constant learning rate, and samples from an averaged generator. "[memory]": the source was not
at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gpkernels._checks import check_choice
from gpkernels.errors import UserError
from gpkernels.kinds import KINDS
from gpkernels.training.config import TrainConfig, flag
from gpkernels.training.objective import Penalties


@dataclass(frozen=True)
class Preset:
    doc: str
    source: str
    settings: Mapping[str, Any]


_NO_PENALTY = {"penalty": "none"}
_BATCH_NORM = {"critic_norm": "batch"}
_MINI = {"ngf": 16, "ndf": 16, "batch_size": 16, "lr": 5e-4, "ema": 0.998, "epochs": 24}
_QI = {**_NO_PENALTY, "lr": 1e-4, "z": "uniform"}
_GOODFELLOW = {**_NO_PENALTY, **_BATCH_NORM, "fresh_z": True}
_CLS_GAN = {
    **_NO_PENALTY,
    **_BATCH_NORM,
    "loss": "cls-gan",
    "condition": "classes",
    "data": "fashion-mnist",
    "gamma": 1.0,
    "margin": 8e-4,
    "lr": 1e-3,
    "flip": False,
}
_GULRAJANI = {"critic_steps": 5, "fresh_z": True, "lr": 1e-4, "beta1": 0.0, "beta2": 0.9}
_MESCHEDER = {
    "loss": "classic-non-saturating",
    "optimizer": "rmsprop",
    "lr": 1e-4,
    "nz": 256,
    "fresh_z": True,
}

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
            "LS-GAN without a penalty, DCGAN critic with BN",
            "Qi 2020 (IJCV), section 7, and its public code, without its final ReLU, with which L died to a constant",
            {**_QI, **_BATCH_NORM},
        ),
        "ls-gan-cost-model": Preset(
            "ls-gan with five convolutions as the critic, BN and ReLU between them",
            "the LS-GAN poster; learning rate and z of ls-gan",
            {**_QI, "critic": "cost-model", "epochs": 24},
        ),
        "gls-gan": Preset(
            "LS-GAN's cost with a slope where the margin is kept, between LS-GAN (0) and WGAN (1); weights clipped",
            "Qi 2020 (IJCV), eq. 16, and its public code, which calls it untested",
            {**_QI, **_BATCH_NORM, "loss": "gls-gan", "slope": 0.5, "clip": 0.04, "epochs": 50},
        ),
        "cls-gan": Preset(
            "conditional LS-GAN: the critic is a classifier",
            "Qi 2020 (IJCV), section 6, and its public code, whose critic has a 3x3 convolution more at each size",
            _CLS_GAN,
        ),
        "cls-gan-semi": Preset(
            "cls-gan as a classifier with 400 labels: half of each batch has labels, the others are guessed where the "
            "critic is sure; its generator learns more slowly",
            "Qi 2020 (IJCV) [memory]; gamma, and that only sure guesses count, are this project's",
            {**_CLS_GAN, "labels": 400, "gamma": 10.0},
        ),
        "gan": Preset(
            "the first GAN, minimax: the generator's loss saturates",
            "Goodfellow et al. 2014, eq. 1 and Algorithm 1; DCGAN's nets and Adam for its perceptrons and SGD",
            {**_GOODFELLOW, "loss": "classic-minimax"},
        ),
        "gan-ns": Preset(
            "the non-saturating GAN",
            "Goodfellow et al. 2014, section 3 and Algorithm 1; DCGAN's nets and Adam for its perceptrons and SGD",
            {**_GOODFELLOW, "loss": "classic-non-saturating"},
        ),
        "dcgan": Preset(
            "gan-ns with DCGAN's batches and uniform z, which both updates share",
            "Radford et al. 2016, section 4 [memory], nets as wide as its public code's; --ngf 128 is the paper's",
            {**_NO_PENALTY, **_BATCH_NORM, "loss": "classic-non-saturating", "batch_size": 128, "z": "uniform"},
        ),
        "lsgan-least-squares": Preset(
            "least squares GAN (not loss-sensitive), for any folder of images",
            "Mao et al. 2017 and their public code for cat faces, which are of 128 pixels",
            {**_NO_PENALTY, **_BATCH_NORM, "loss": "least-squares", "z": "uniform"},
        ),
        "wgan": Preset(
            "the first WGAN: weights clipped to [-0.01, 0.01]",
            "Arjovsky et al. 2017, Algorithm 1, without the public code's 100 critic steps now and then",
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
            "Gulrajani et al. 2017, Algorithm 1 [memory]",
            {**_GULRAJANI, "loss": "wasserstein", "penalty": "coupled"},
        ),
        "dragan": Preset(
            "the GAN with a penalty around real images, noise on both sides",
            "Kodali et al. 2017 and their public code, whose noise is on one side and nets are perceptrons",
            {
                "loss": "classic-non-saturating",
                "penalty": "local",
                "lr": 1e-4,
                "beta2": 0.9,
                "z": "uniform",
                "fresh_z": True,
                "batch_size": 128,
            },
        ),
        "r1": Preset(
            "the GAN with half the squared gradient norm at real images",
            "Mescheder et al. 2018, eq. 9, and their public code; DCGAN's nets for its ResNets",
            {**_MESCHEDER, "penalty": "r1"},
        ),
        "r2": Preset(
            "the GAN with half the squared gradient norm at generated images",
            "Mescheder et al. 2018, eq. 10, and their public code; DCGAN's nets for its ResNets",
            {**_MESCHEDER, "penalty": "r2"},
        ),
        "sngan": Preset(
            "hinge loss, ResNets, spectral norm",
            "Miyato et al. 2018, tables 3 to 6, and their public code, which draws 128 z for the generator and "
            "lets the learning rate fall",
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
            "the conditional GAN: one-hot labels beside z and image, uniform z",
            "Mirza and Osindero 2014 [memory]; DCGAN's nets and Adam for its perceptrons and SGD",
            {
                **_GOODFELLOW,
                "loss": "classic-non-saturating",
                "condition": "concat",
                "data": "fashion-mnist",
                "z": "uniform",
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


def describe(name: str) -> str:
    """What a person wants to know of a preset: its loss, penalty and training, what else it sets, and its source."""
    preset, config = PRESETS[name], from_preset(name, {})
    betas = f" ({config.beta1:g}, {config.beta2:g})" if config.optimizer == "adam" else ""
    clipped = f", weights clipped to {config.clip:g}" if config.clip is not None else ""
    norm = ", spectral norm" if config.spectral_norm else ""
    penalty = "none" if config.penalty == "none" else f"{config.penalty_weight:g} x {config.penalty}"
    penalties = Penalties(config).each
    if penalties:
        penalty += f", R(n) = {_form(config)}, norm per {penalties[0].axes}"
    shown = {"loss", "penalty", "spectral_norm", "clip", "optimizer", "lr", "beta1", "beta2"}
    shown |= {"batch_size", "critic_steps", "epochs"}
    rows = {
        "loss": config.loss,
        "penalty": penalty + norm + clipped,
        "training": (
            f"{config.optimizer} {config.lr:g}{betas}, batches of {config.batch_size}, {config.epochs} epochs, "
            f"{config.critic_steps} of the critic's updates to 1 of the generator's"
        ),
        "also": " ".join(_as_flag(key, value) for key, value in preset.settings.items() if key not in shown) or "-",
        "source": preset.source,
    }
    return "\n".join([name, f"  {preset.doc}", *(f"    {title:8}  {text}" for title, text in rows.items())])


def _form(config: TrainConfig) -> str:
    """The form of a config's penalties, and its factor where that is not 1."""
    if config.penalty_form is not None:
        return config.penalty_form
    kind = KINDS[config.penalty.split("+")[0]]  # R1 and R2 have the same
    return kind.form if kind.factor == 1 else f"{kind.factor:g} x {kind.form}"


def _as_flag(key: str, value: Any) -> str:
    """As it is written on the command line."""
    if isinstance(value, bool):
        return flag(key) if value else flag(f"no_{key}")
    return f"{flag(key)} {value}"
