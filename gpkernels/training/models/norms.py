"""The norms of critics: number of channels to layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

CRITIC_NORMS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "none": lambda channels: nn.Identity(),
        "batch": nn.BatchNorm2d,
        "layer": lambda channels: nn.GroupNorm(1, channels),  # over a sample, a gain and a bias a channel: WGAN-GP's
        "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    }
)
