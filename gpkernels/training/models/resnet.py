"""The ResNets of SNGAN ("resnet") and of WGAN-GP ("resnet-wgan-gp").

Sources: Miyato et al. 2018, tables 4 (32 pixels) and 6 (128), and the authors' code for 64; Gulrajani et al. 2017,
appendix, and the authors' code (32: its CIFAR-10 ResNet; 64: its default pair). Widths are in units of ngf and ndf, so
that 64 gives the published ones, 32-pixel SNGAN's 256 and 128 among them, with nz 128 as in both papers. WGAN-GP's pair
for 128 pixels is this project's own: that for 64 with a block more, of the greatest width, in each net.

Blocks are pre-activated: norm, ReLU, 3x3 convolution, norm, ReLU, 3x3 convolution, beside a shortcut, which is a 1x1
convolution where shape changes. Generators have BatchNorm, SNGAN's critic none (and spectral norm), WGAN-GP's layer
norm from 64 pixels on and none at 32. Both draw weights as Glorot and Bengio do, times sqrt(2) in the 3x3 convolutions
of blocks. Pooling and 1x1 convolution, upsampling and 1x1 convolution commute: the convolution runs where it is
smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

from gpkernels.training.models.conditional import Layers, MakeNorm, Parts, UsesLabels, apply_layer
from gpkernels.training.models.norms import CRITIC_NORMS


@dataclass(frozen=True)
class Architecture:
    """Widths of a pair, in multiples of ngf and ndf."""

    generator: tuple[int, ...]  # of the 4x4 features that z becomes, and of the blocks, each of which doubles the side
    down: tuple[int, ...]  # of the critic's blocks that halve the side
    keep: tuple[int, ...] = ()  # of those after them that keep it
    stem: int = 0  # of a 3x3 convolution before the blocks; 0: the first block takes the image
    pool: str = "sum"  # what becomes of the last features' positions: "sum", "mean", or "none", which keeps them
    first_bias: bool = True  # whether the first convolution of a block has a bias


FAMILIES: Mapping[str, Mapping[int, Architecture]] = MappingProxyType(
    {
        "resnet": {
            32: Architecture((4, 4, 4, 4), (2, 2), (2, 2)),
            64: Architecture((16, 8, 4, 2, 1), (1, 2, 4, 8, 16)),
            128: Architecture((16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16), (16,)),
        },
        "resnet-wgan-gp": {
            32: Architecture((2, 2, 2, 2), (2, 2), (2, 2), pool="mean"),
            64: Architecture((8, 8, 4, 2, 1), (2, 4, 8, 8), stem=1, pool="none", first_bias=False),
            128: Architecture((8, 8, 8, 4, 2, 1), (2, 4, 8, 8, 8), stem=1, pool="none", first_bias=False),
        },
    }
)


class GeneratorBlock(UsesLabels):
    """(B, inputs, S, S) to (B, outputs, 2S, 2S)."""

    def __init__(self, inputs: int, outputs: int, norm: MakeNorm, first_bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=first_bias)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.conv1(_upsampled(F.relu(apply_layer(self.norm1, x, y))))
        h = self.conv2(F.relu(apply_layer(self.norm2, h, y)))
        return h + _upsampled(self.shortcut(x))


class CriticBlock(nn.Module):
    """(B, inputs, S, S) to (B, outputs, S, S), or half S with `down`. `first`: on images, without norms or ReLU."""

    def __init__(
        self, inputs: int, outputs: int, norm: str, *, down: bool, first: bool = False, first_bias: bool = True
    ) -> None:
        super().__init__()
        self.down, self.first = down, first
        hidden = outputs if first else inputs
        make = CRITIC_NORMS["none" if first else norm]
        self.norm1, self.norm2 = make(inputs), make(hidden)
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1, bias=first_bias)
        self.conv2 = nn.Conv2d(hidden, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if down or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.first else F.relu(self.norm1(x))
        h = self.conv2(F.relu(self.norm2(self.conv1(h))))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.shortcut(x)


class Pool(nn.Module):
    """(B, C, S, S) to (B, C), "sum" or "mean"; "none": to (B, C S S)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, h: Tensor) -> Tensor:
        return {"sum": h.sum, "mean": h.mean}[self.how]((2, 3)) if self.how != "none" else h.flatten(1)

    def extra_repr(self) -> str:
        return self.how


def generator(family: str, inputs: int, *, channels: int, width: int, size: int, norm: MakeNorm) -> Layers:
    """A dense layer to 4x4, blocks that double the side; BatchNorm (never conditional), ReLU, 3x3 convolution, tanh."""
    row = FAMILIES[family][size]
    base, *widths = (width * multiple for multiple in row.generator)
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, base * 16), nn.Unflatten(1, (base, 4, 4))]
    for outputs in widths:
        layers.append(GeneratorBlock(base, outputs, norm, row.first_bias))
        base = outputs
    layers += [nn.BatchNorm2d(base), nn.ReLU(inplace=True), nn.Conv2d(base, channels, 3, padding=1), nn.Tanh()]
    return Layers(layers, initialise)


def critic(family: str, channels: int, outputs: int, *, width: int, size: int, norm: str) -> Parts:
    """Blocks that halve the side, blocks that keep it, pooling (ReLU before "sum" and "mean"), a dense layer."""
    row = FAMILIES[family][size]
    layers: list[nn.Module] = []
    inputs = channels
    if row.stem:
        layers.append(nn.Conv2d(channels, width * row.stem, 3, padding=1))
        inputs = width * row.stem
    for number, multiple in enumerate((*row.down, *row.keep)):
        first, down = not layers, number < len(row.down)
        layers.append(
            CriticBlock(inputs, width * multiple, norm, down=down, first=first, first_bias=row.first_bias or first)
        )
        inputs = width * multiple
    if row.pool == "none":
        inputs *= (size >> len(row.down)) ** 2
    else:
        layers.append(nn.ReLU())
    return Parts(nn.Sequential(*layers, Pool(row.pool)), nn.Linear(inputs, outputs), initialise)


def initialise(module: nn.Module) -> None:
    if isinstance(module, GeneratorBlock | CriticBlock):  # after their own convolutions
        for conv in (module.conv1, module.conv2):
            nn.init.xavier_uniform_(conv.weight, 2**0.5)
    elif isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
        nn.init.xavier_uniform_(module.weight)
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _upsampled(h: Tensor) -> Tensor:
    return F.interpolate(h, scale_factor=2, mode="nearest")
