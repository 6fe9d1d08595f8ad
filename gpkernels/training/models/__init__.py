"""The generators and critics of the trainer, for images of 32, 64 and 128 pixels.

generator(z, y=None): z of shape (B, nz) to images of shape (B, channels, size, size) in [-1, 1].
critic(x, y=None): such images to scores of shape (B,).
y, int64 labels of shape (B,) below `classes`, is wanted where there is a condition, and refused where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from gpkernels.errors import UserError
from gpkernels.latents import LATENTS
from gpkernels.spectral import spectral_norm_all
from gpkernels.training.config import TrainConfig
from gpkernels.training.models import cost_model, dcgan, resnet
from gpkernels.training.models.conditional import (
    CONDITIONS,
    ClassifierCritic,
    ConditionalBatchNorm2d,
    Critic,
    Generator,
    Layers,
    Parts,
    images_of,
    labels_in_turn,
)

__all__ = ["ClassifierCritic", "Critic", "Generator", "build", "draw_z", "images_of", "labels_in_turn"]

SIZES = (32, 64, 128)
GENERATOR_LAYERS: Mapping[str, Callable[..., Layers]] = {
    "dcgan": dcgan.generator,
    **{name: partial(resnet.generator, name) for name in resnet.FAMILIES},
}
CRITIC_PARTS: Mapping[str, Callable[..., Parts]] = {
    "dcgan": dcgan.critic,
    "cost-model": cost_model.critic,
    **{name: partial(resnet.critic, name) for name in resnet.FAMILIES},
}


def build(config: TrainConfig, channels: int, size: int, classes: int = 0) -> tuple[Generator, Critic]:
    """The generator and the critic of a run on images of this shape, from `classes` classes (0: without labels).

    The critic of condition "classes" is a `ClassifierCritic`. Raises UserError for a size that the architectures do
    not have, and for a condition without at least two classes.
    """
    if size not in SIZES:
        raise UserError(f"--image-size: wanted one of {', '.join(map(str, SIZES))}, got {size}")
    if config.condition != "none" and classes < 2:
        raise UserError(f"--condition {config.condition}: wanted data with at least two classes, got {classes}")
    condition = CONDITIONS[config.condition]
    classes = 0 if condition.name == "none" else classes
    layers = GENERATOR_LAYERS[config.generator](
        config.nz + classes * condition.in_z,
        channels=channels,
        width=config.ngf,
        size=size,
        norm=partial(ConditionalBatchNorm2d, classes) if condition.in_norm else nn.BatchNorm2d,
    )
    generator = Generator(layers, classes, label_in_z=condition.in_z)
    parts = CRITIC_PARTS[config.critic](
        channels + classes * condition.in_x,
        classes if condition.logits else 1,
        width=config.ndf,
        size=size,
        norm=config.critic_norm,
    )
    critic = condition.critic(parts, classes)
    if config.spectral_norm:
        spectral_norm_all(critic)
    return generator, critic


def draw_z(config: TrainConfig, count: int, generator: torch.Generator) -> Tensor:
    """Latent vectors (count, nz), on the CPU: N(0, 1) or U(-1, 1)."""
    return LATENTS[config.z](count, config.nz, generator=generator)
