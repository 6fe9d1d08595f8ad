"""Images in memory with their labels, and the batches that training cuts out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig


@dataclass
class ImageSet:
    """Images of shape (N, channels, size, size), uint8, their labels where there are some, and what to say of them."""

    name: str
    images: np.ndarray
    note: str = ""
    shift: int = 0  # the augmentation that suits it, in pixels
    passes: int = 1  # passes over the images that make an epoch
    skipped: list[str] = field(default_factory=list)  # files that could not be read, with the reason
    labels: np.ndarray | None = None  # (N,), int64
    class_names: tuple[str, ...] = ()
    load_held_out: Callable[[], ImageSet | None] = lambda: None
    _known: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)
    _last_order: tuple[tuple[int, int, int], np.ndarray] | None = field(default=None, repr=False)

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> int:
        return self.images.shape[2]

    @property
    def classes(self) -> int:
        """How many classes the labels are of; 0 without labels."""
        return len(self.class_names)

    def held_out(self) -> ImageSet | None:
        """The official test part of the data, which is read now; None where there is none, or training may use it."""
        return self.load_held_out()

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, len(self.images) * self.passes // batch_size)

    def batch(self, config: TrainConfig, step: int, generator: torch.Generator) -> Tensor:
        """The real images of a step: shape (batch, channels, size, size), float32 in [-1, 1]."""
        shift = self.shift if config.shift is None else config.shift
        images = torch.from_numpy(self.images[self._chosen(config, step)])
        return augment(images, flip=config.flip, shift=shift, generator=generator).float() / 127.5 - 1

    def batch_labels(self, config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
        """The labels of a step's images, int64, and which of them training may know, bool: both of shape (batch,).

        Raises UserError for data without labels, and as `known`.
        """
        labels = self._need_labels()
        chosen = self._chosen(config, step)
        known = np.ones(len(chosen), bool) if config.labels is None else self.known(config)[chosen]
        return torch.from_numpy(labels[chosen]), torch.from_numpy(known)

    def known(self, config: TrainConfig) -> np.ndarray:
        """Which images keep their label, (N,), bool: all, or `config.labels` of them, as many of each class as of any.

        They are the first in an order of all images that the seed fixes, so that more labels include fewer. Raises
        UserError for data without labels, a number that the classes do not divide, and a class with too few images.
        """
        labels = self._need_labels()
        if config.labels is None:
            return np.ones(len(labels), bool)
        key = config.seed, config.labels
        if key not in self._known:
            self._known[key] = self._first_of_each_class(labels, config)
        return self._known[key]

    def _first_of_each_class(self, labels: np.ndarray, config: TrainConfig) -> np.ndarray:
        assert config.labels is not None
        each, rest = divmod(config.labels, self.classes)
        if rest:
            raise UserError(f"--labels: wanted a multiple of the {self.classes} classes, got {config.labels}")
        order = torch.randperm(
            len(labels), generator=torch.Generator().manual_seed(config.seed * 1_000_003 - 1)
        ).numpy()
        known = np.zeros(len(labels), bool)
        for label, name in enumerate(self.class_names):
            of_class = order[labels[order] == label]
            if len(of_class) < each:
                raise UserError(
                    f"--labels: wanted at least {each} images of each class, got {len(of_class)} of {name!r}"
                )
            known[of_class[:each]] = True
        return known

    def _need_labels(self) -> np.ndarray:
        if self.labels is None:
            raise UserError(f"--condition: wanted data with labels, got {self.name} without")
        return self.labels

    def _chosen(self, config: TrainConfig, step: int) -> np.ndarray:
        """Numbers of the images of a step."""
        epoch, index = divmod(step, self.steps_per_epoch(config.batch_size))
        key = config.seed, config.batch_size, epoch
        if self._last_order is None or self._last_order[0] != key:
            self._last_order = key, self._order(config, epoch).numpy()
        return self._last_order[1][index * config.batch_size :][: config.batch_size]

    def _order(self, config: TrainConfig, epoch: int) -> Tensor:
        """Image numbers of an epoch: shuffled passes, as many as fill at least one batch."""
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        count = len(self.images)
        passes = max(self.passes, -(-config.batch_size // count))
        return torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])


def augment(images: Tensor, *, flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) mirrored with probability 1/2 and shifted by up to `shift` pixels, edges repeated."""
    batch, _, height, width = images.shape
    draws = torch.randint(-shift, shift + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + draws[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + draws[1]).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    picked = images[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).contiguous()
