"""DCGAN generator and critics for 32x32 and 64x64 images (Radford et al. 2016, weights from N(0, 0.02))."""

from __future__ import annotations

from torch import Tensor, nn

from gpkernels.spectral import spectral_norm_all
from gpkernels.training.config import TrainConfig


class Generator(nn.Module):
    """z of shape (B, nz) to images of shape (B, channels, size, size) in [-1, 1]."""

    def __init__(self, nz: int, channels: int, width: int, size: int) -> None:
        super().__init__()
        multiple = size // 8
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(nz, width * multiple, 4, bias=False),
            nn.BatchNorm2d(width * multiple),
            nn.ReLU(inplace=True),
        ]
        while multiple > 1:
            layers += [
                nn.ConvTranspose2d(width * multiple, width * multiple // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width * multiple // 2),
                nn.ReLU(inplace=True),
            ]
            multiple //= 2
        layers += [nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z[:, :, None, None])


class Critic(nn.Module):
    """Images of shape (B, channels, size, size) to L, shape (B,): low for real images.

    Stride-2 convolutions down to 4x4 and one 4x4 convolution to a number: five at 64x64. All but the last are
    followed by LeakyReLU 0.2 for "dcgan", by BatchNorm and ReLU for "cost-model". The last gives L itself: with a
    ReLU after it, or BatchNorm and ReLU, L died to a constant 0 within 1,500 steps of the penalised loss.
    """

    def __init__(self, kind: str, channels: int, width: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, outputs = channels, width
        while size > 4:
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False), *_after(kind, outputs)]
            inputs, outputs, size = outputs, outputs * 2, size // 2
        layers.append(nn.Conv2d(inputs, 1, 4, bias=False))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten()


def _after(kind: str, channels: int) -> list[nn.Module]:
    if kind == "cost-model":
        return [nn.BatchNorm2d(channels), nn.ReLU()]
    return [nn.LeakyReLU(0.2)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def build(config: TrainConfig, channels: int, size: int) -> tuple[Generator, Critic]:
    """The generator and the critic of a run on images of this shape."""
    generator = Generator(config.nz, channels, config.ngf, size)
    critic = Critic(config.critic, channels, config.ndf, size)
    if config.spectral_norm:
        spectral_norm_all(critic)
    return generator, critic
