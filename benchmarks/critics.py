"""The critics of the benchmarks, as people write them: none knows of this package.

`CRITICS[name].build(width, size)` is a critic of images (B, 3, size, size), but for "MLP", which takes (B, size^2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gpkernels.training.config import TrainConfig
from gpkernels.training.models import build

NORMS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "none": lambda channels, size: [],
    "spectral": lambda channels, size: [],
    "batch": lambda channels, size: [nn.BatchNorm2d(channels)],
    "instance": lambda channels, size: [nn.InstanceNorm2d(channels, affine=True)],
    "layer": lambda channels, size: [nn.LayerNorm([channels, size, size])],
    "group": lambda channels, size: [nn.GroupNorm(min(8, channels), channels)],
}


def dcgan(norm: str, width: int, size: int = 64, channels: int = 3) -> nn.Sequential:
    """DCGAN's critic: stride-2 convolutions down to 4x4, each but the first and the last with a norm."""
    wrap = spectral_norm if norm == "spectral" else lambda layer: layer
    layers: list[nn.Module] = [wrap(nn.Conv2d(channels, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
    size //= 2
    while size > 4:
        size //= 2
        layers.append(wrap(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=norm in ("none", "spectral"))))
        layers += [*NORMS[norm](2 * width, size), nn.LeakyReLU(0.2)]
        width *= 2
    return nn.Sequential(*layers, wrap(nn.Conv2d(width, 1, 4)))


def patchgan(width: int, size: int) -> nn.Sequential:
    """pix2pix's critic of overlapping patches (Isola et al. 2017), one stride-2 layer fewer at 32 pixels."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for stride in (2, 2, 1) if size > 32 else (2, 1):
        layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False), nn.InstanceNorm2d(2 * width)]
        layers.append(nn.LeakyReLU(0.2, True))
        width *= 2
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))


def mlp(width: int, size: int) -> nn.Sequential:
    """Three hidden layers, on images as vectors."""
    return nn.Sequential(
        nn.Linear(size * size, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, 1),
    )


class Residual(nn.Module):
    """StyleGAN2's residual critic (Karras et al. 2020): equalised learning rate, smoothed halving, minibatch standard
    deviation, dense layers."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.stem = _Equalised(3, width, 1)
        blocks, top = [], 8 * width
        while size > 4:
            wider = min(2 * width, top)
            blocks.append(nn.ModuleList([_Equalised(width, width, 3), _Equalised(width, wider, 3)]))
            blocks[-1].append(_Equalised(width, wider, 1, bias=False))
            width, size = wider, size // 2
        self.blocks = nn.ModuleList(blocks)
        self.last = _Equalised(width + 1, width, 3)
        self.dense = nn.Sequential(nn.Linear(16 * width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))
        self.register_buffer("blur", torch.tensor([1.0, 3.0, 3.0, 1.0]).outer(torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64)

    def _halved(self, x: Tensor) -> Tensor:
        taps = self.blur.expand(x.shape[1], 1, 4, 4)
        return nn.functional.conv2d(x, taps, stride=2, padding=1, groups=x.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        h = _active(self.stem(x))
        for first, second, shortcut in self.blocks:  # type: ignore[misc]
            main = _active(self._halved(second(_active(first(h)))))
            h = (main + shortcut(self._halved(h))) * 0.5**0.5
        std = (h.var(0, unbiased=False) + 1e-8).sqrt().mean()
        h = torch.cat([h, std.expand(len(h), 1, *h.shape[2:])], 1)
        return self.dense(_active(self.last(h)).flatten(1))


class _Equalised(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain, self.padding = (inputs * kernel**2) ** -0.5, kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight * self.gain, self.bias, padding=self.padding)


def _active(x: Tensor) -> Tensor:
    return nn.functional.leaky_relu(x, 0.2) * 2**0.5


def resnet(family: str, norm: str, width: int, size: int) -> nn.Module:
    """The trainer's ResNets, with torch's spectral norm where SNGAN has its own."""
    config: dict[str, Any] = {"critic": family, "critic_norm": norm, "ndf": width, "ngf": 1}
    critic = build(TrainConfig(**config), 3, size)[1]
    if family == "resnet":
        for layer in [m for m in critic.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
            spectral_norm(layer)
    return critic


@dataclass(frozen=True)
class Critic:
    """`width` is the published one, in the units of `build`."""

    build: Callable[[int, int], nn.Module]
    width: int = 64
    sizes: tuple[int, ...] = (32, 64, 128)

    def shape(self, size: int) -> tuple[int, ...]:
        """Of one input."""
        return (size * size,) if self.build is mlp else (3, size, size)


CRITICS: dict[str, Critic] = {
    **{f"DCGAN {norm}": Critic(lambda width, size, norm=norm: dcgan(norm, width, size)) for norm in NORMS},  # type: ignore[misc]
    "SNGAN-ResNet": Critic(lambda width, size: resnet("resnet", "none", width, size)),
    "WGAN-GP-ResNet": Critic(lambda width, size: resnet("resnet-wgan-gp", "layer", width, size), sizes=(32, 64)),
    "PatchGAN": Critic(patchgan),
    "StyleGAN2": Critic(Residual),
    "MLP": Critic(mlp, width=1024),
}
