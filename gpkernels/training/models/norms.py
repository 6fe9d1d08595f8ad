"""The norms of critics, and whose statistics they keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CRITIC_NORMS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "none": lambda channels: nn.Identity(),
        "batch": nn.BatchNorm2d,
        "layer": lambda channels: nn.GroupNorm(1, channels),  # over a sample, a gain and a bias a channel: WGAN-GP's
        "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    }
)
"""Number of channels to layer."""


def statistics(net: nn.Module) -> list[Tensor]:
    """The running statistics of BatchNorm layers."""
    return [buffer for layer in net.modules() if isinstance(layer, _BatchNorm) for buffer in layer.buffers()]


@contextlib.contextmanager
def still_statistics(net: nn.Module, still: bool = True) -> Iterator[None]:
    """Inside, if `still`, BatchNorm layers of `net` normalise as ever but leave their running mean and variance as they
    are."""
    momenta = {layer: layer.momentum for layer in net.modules() if still and isinstance(layer, _BatchNorm)}
    try:
        for layer in momenta:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
