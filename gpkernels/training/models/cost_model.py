"""The cost model of the LS-GAN poster: five convolutions at 64 pixels, with BatchNorm and ReLU between them.

The last gives L itself. With a ReLU after it, or BatchNorm and ReLU, L died to a constant 0 within 1,500 steps of the
penalised loss.
"""

from __future__ import annotations

from torch import nn

from gpkernels.training.models.conditional import Parts
from gpkernels.training.models.dcgan import initialise


def critic(channels: int, outputs: int, *, width: int, size: int, norm: str) -> Parts:
    """Stride-2 convolutions down to 4x4, each with BatchNorm and ReLU, and a 4x4 convolution; `norm` is "none"."""
    layers: list[nn.Module] = []
    while size > 4:
        layers += [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels, width, size = width, width * 2, size // 2
    return Parts(nn.Sequential(*layers), nn.Conv2d(channels, outputs, 4, bias=False), initialise)
