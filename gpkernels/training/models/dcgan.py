"""DCGAN's generator and critic (Radford et al. 2016), weights from N(0, 0.02).

The public Torch code's sizes, half as wide as the paper's figure 1: at 64 pixels, with nz 100, widths 64 and 3
channels, the generator has 3,576,704 parameters and the critic with norm "batch" 2,765,568. At 32 pixels there is one
layer less, at 128 one more, which the paper has not.
"""

from __future__ import annotations

from torch import nn

from gpkernels.training.models.conditional import Layers, MakeNorm, Parts
from gpkernels.training.models.norms import CRITIC_NORMS


def generator(inputs: int, *, channels: int, width: int, size: int, norm: MakeNorm) -> Layers:
    """Transposed convolutions from 1x1 to 4x4 and then by two each, with a norm and ReLU; tanh at the end."""
    multiple = size // 8
    layers: list[nn.Module] = [
        nn.ConvTranspose2d(inputs, width * multiple, 4, bias=False),
        norm(width * multiple),
        nn.ReLU(inplace=True),
    ]
    while multiple > 1:
        layers += [
            nn.ConvTranspose2d(width * multiple, width * multiple // 2, 4, 2, 1, bias=False),
            norm(width * multiple // 2),
            nn.ReLU(inplace=True),
        ]
        multiple //= 2
    layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
    return Layers(layers, initialise)


def critic(channels: int, outputs: int, *, width: int, size: int, norm: str) -> Parts:
    """Stride-2 convolutions down to 4x4, with LeakyReLU 0.2 and, but for the first, a norm; a 4x4 convolution."""
    layers: list[nn.Module] = []
    while size > 4:
        layers.append(nn.Conv2d(channels, width, 4, 2, 1, bias=False))
        if layers[1:] and norm != "none":
            layers.append(CRITIC_NORMS[norm](width))
        layers.append(nn.LeakyReLU(0.2))
        channels, width, size = width, width * 2, size // 2
    return Parts(nn.Sequential(*layers), nn.Conv2d(channels, outputs, 4, bias=False), initialise)


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d) and module.affine:
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
