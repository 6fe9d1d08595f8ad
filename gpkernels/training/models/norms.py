"""The norms of critics, and whose statistics they keep."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

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
    """The running statistics of BatchNorm and InstanceNorm layers."""
    return [buffer for layer in net.modules() if isinstance(layer, _NormBase) for buffer in layer.buffers()]


@contextlib.contextmanager
def still_statistics(net: nn.Module, still: bool = True) -> Iterator[None]:
    """Inside, if `still`, BatchNorm and InstanceNorm layers of `net` normalise as ever but leave their running
    statistics as they are: mean, variance, and the count of batches, by which momentum None averages."""
    layers = [layer for layer in net.modules() if still and isinstance(layer, _NormBase)]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    try:
        for layer in layers:
            layer.momentum, layer.num_batches_tracked = 0.0, None
        yield
    finally:
        for layer, (momentum, count) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, count
