"""What a label does in a generator and in a critic: one row of `CONDITIONS` each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpkernels._checks import fail
from gpkernels.training.models.modes import eval_mode


class Parts(NamedTuple):
    """A critic's two halves, images to features and features to outputs, and how their weights are drawn."""

    body: nn.Module
    head: nn.Conv2d | nn.Linear
    initialise: Callable[[nn.Module], None]


class Layers(NamedTuple):
    """A generator's layers, from z as a 1x1 image on, and how their weights are drawn."""

    layers: Sequence[nn.Module]
    initialise: Callable[[nn.Module], None]


MakeNorm = Callable[[int], nn.Module]
"""The number of channels to a norm, which may use labels."""


class UsesLabels(nn.Module):
    """A layer whose forward takes (h, y)."""


def apply_layer(layer: nn.Module, h: Tensor, y: Tensor | None) -> Tensor:
    return layer(h, y) if isinstance(layer, UsesLabels) else layer(h)


class ConditionalBatchNorm2d(UsesLabels):
    """gain_y * batch_norm(h) + bias_y, a gain and a bias for each class and channel, at first 1 and 0.

    Conditional instance norm (Dumoulin et al. 2017, eq. 5 [memory]) with batch statistics, as SNGAN with projection
    has it (Miyato and Koyama 2018).
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = nn.Parameter(torch.ones(classes, channels))
        self.bias = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(self.bias[y][:, :, None, None], self.norm(h), self.gain[y][:, :, None, None])


class Generator(nn.Module):
    """z of shape (B, nz), and labels where there is a condition, to images (B, channels, size, size) in [-1, 1].

    `label_in_z`: the layers take the one-hot label after z. Raises TypeError, ValueError as `check_labels`.
    """

    def __init__(self, parts: Layers, classes: int = 0, *, label_in_z: bool = False) -> None:
        super().__init__()
        self.classes, self.label_in_z = classes, label_in_z
        self.layers = nn.Sequential(*parts.layers)
        self.apply(parts.initialise)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        check_labels(y, len(z), self.classes)
        if self.label_in_z and y is not None:
            z = torch.cat([z, F.one_hot(y, self.classes).to(z.dtype)], 1)
        h = z[:, :, None, None]
        for layer in self.layers:
            h = apply_layer(layer, h, y)
        return h


class Critic(nn.Module):
    """Images of shape (B, channels, size, size) to scores of shape (B,): head(body(x)).

    Raises TypeError, ValueError for labels as `check_labels`, as the critics below do; here none are wanted.
    Highest gradient order: any, here and below.
    """

    def __init__(self, parts: Parts, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.body, self.head = parts.body, parts.head
        self.apply(parts.initialise)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        check_labels(y, len(x), self.classes)
        return self.head(self.body(x)).flatten()


class ConcatCritic(Critic):
    """The label as one-hot constant maps after the image's channels (CGAN, Mirza and Osindero 2014, for images)."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = check_labels(y, len(x), self.classes)
        maps = F.one_hot(y, self.classes).to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        if x.is_contiguous(memory_format=torch.channels_last):  # else cat gives the layout up
            maps = maps.contiguous(memory_format=torch.channels_last)
        return self.head(self.body(torch.cat([x, maps], 1))).flatten()


class ProjectionCritic(Critic):
    """head(h) + <embedding(y), h> for the features h = body(x) (Miyato and Koyama 2018, eq. 3 [memory])."""

    def __init__(self, parts: Parts, classes: int) -> None:
        super().__init__(parts, classes)
        self.embedding = nn.Embedding(classes, parts.head.weight[0].numel())
        self.embedding.apply(parts.initialise)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = check_labels(y, len(x), self.classes)
        h = self.body(x)
        return self.head(h).flatten() + (self.embedding(y) * h.flatten(1)).sum(1)


class ClassifierCritic(Critic):
    """L(x, y) = -log softmax(a(x))_y of the logits a(x), one a class: CLS-GAN (Qi 2020), low for real pairs."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = check_labels(y, len(x), self.classes)
        return F.cross_entropy(self.logits(x), y, reduction="none")

    def logits(self, x: Tensor) -> Tensor:
        """a(x), of shape (B, classes)."""
        return self.head(self.body(x)).flatten(1)

    def guess(self, x: Tensor) -> Tensor:
        """a(x) in eval mode and without gradient; changes nothing. Its argmax is argmin_y L(x, y)."""
        with eval_mode(self), torch.no_grad():
            return self.logits(x)


@dataclass(frozen=True)
class Condition:
    """Where the label enters, and the class of the critic."""

    name: str
    critic: type[Critic]
    in_z: bool = False  # one-hot after z
    in_norm: bool = False  # class-conditional BatchNorm in the generator
    in_x: bool = False  # one-hot maps after the critic's image
    logits: bool = False  # an output of the critic for each class


CONDITIONS: Mapping[str, Condition] = MappingProxyType(
    {
        row.name: row
        for row in (
            Condition("none", Critic),
            Condition("concat", ConcatCritic, in_z=True, in_x=True),
            Condition("projection", ProjectionCritic, in_norm=True),
            Condition("classes", ClassifierCritic, in_z=True, logits=True),
        )
    }
)


def check_labels(y: Tensor | None, batch: int, classes: int) -> Any:
    """y, if it is what a net of so many classes wants: None for 0, else int64 labels of shape (batch,).

    Raises TypeError, ValueError otherwise. That labels are below `classes` is left to torch: looking at them would
    wait for a GPU.
    """
    if classes == 0:
        if y is not None:
            raise fail("y", "None for a net without a condition", type(y).__name__)
        return None
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y: wanted int64 labels, got {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    if y.shape != (batch,):
        raise fail("y", f"labels of shape ({batch},)", tuple(y.shape))
    return y


def labels_in_turn(classes: int, count: int, device: torch.device | None = None) -> Tensor | None:
    """0, 1, ... of so many classes over and over, (count,); None for 0."""
    return torch.arange(count, device=device) % classes if classes else None


@torch.no_grad()
def images_of(generator: nn.Module, z: Tensor, y: Tensor | None = None, batch: int = 256) -> Tensor:
    """What the generator makes of z (N, nz), and of labels (N,) where it wants some, on the CPU, in parts."""
    device = next((p.device for p in generator.parameters()), z.device)
    parts = zip(*(what.to(device).split(batch) for what in (z, y) if what is not None), strict=True)
    return torch.cat([generator(*part).cpu() for part in parts])
