"""Images with their labels, in memory, mapped into it or on a GPU, and the batches that training cuts out of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpkernels.errors import UserError
from gpkernels.pixels import to_float
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import own


@dataclass(frozen=True)
class Shard:
    """The index-th of `count` equal parts of a step's batch; `count` divides the batch size."""

    index: int = 0
    count: int = 1

    def of(self, total: int) -> slice:
        size = total // self.count
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Shard()


class Stream:
    """Pass after pass over `members`, without end, each shuffled by (seed, pass): `stream[places]`."""

    def __init__(self, members: np.ndarray, seed: int) -> None:
        self.members, self.seed = members, seed
        self._passes: dict[int, np.ndarray] = {}

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        passes, indices = np.divmod(places, len(self.members))
        found = np.empty_like(self.members, shape=places.shape)
        for number in np.unique(passes):
            found[passes == number] = self._pass(int(number))[indices[passes == number]]
        return found

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._passes:
            if len(self._passes) > 1:
                del self._passes[min(self._passes)]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._passes[number] = self.members[torch.randperm(len(self.members), generator=generator).numpy()]
        return self._passes[number]


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
    loaded_as: str | None = field(default=None, init=False)  # the config's `data`, where `load` made it
    _resident: Tensor | None = field(default=None, init=False, repr=False)  # the images, on a GPU
    _known: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _streams: dict[tuple[int, int | None], list[Stream]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray | Tensor,
        labels: Sequence[int] | np.ndarray | Tensor | None = None,
        class_names: Sequence[str] = (),
        held_out: ImageSet | None = None,
        *,
        name: str = "arrays",
    ) -> ImageSet:
        """Images of your own: uint8, (N, C, S, S) or (N, S, S, C), C 1 or 3; labels (N,), from 0 on.

        `held_out` is what evaluation and classification errors use. Raises TypeError or ValueError, naming the
        argument.
        """
        array = own.pixels(images)
        numbers, names = own.labelled(labels, class_names, len(array))
        return cls(name, array, labels=numbers, class_names=names, load_held_out=lambda: held_out)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        class_names: Sequence[str] = (),
        held_out: ImageSet | None = None,
        *,
        name: str = "dataset",
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> ImageSet:
        """A torch map-style data set of images, or of (image, label), read once into memory.

        Images are PIL's, or uint8 or floating-point [0, 1] arrays or tensors, square and all of one size; what the data
        set draws at random is drawn once. Without `class_names` its `classes` are used, where it has some. Raises
        TypeError or ValueError, naming the item.
        """
        array, labels = own.gather(dataset, progress)
        if labels is not None and not class_names:
            class_names = tuple(map(str, getattr(dataset, "classes", ())))
        return cls.from_arrays(array, labels, class_names, held_out, name=name)

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

    @property
    def epoch_images(self) -> int:
        """How many images make an epoch."""
        return len(self.images) * self.passes

    def fingerprint(self) -> str:
        """Differs for another number, size or order of images, and for other labels. Looks at 64 images at most."""
        digest = hashlib.sha256(repr((self.images.shape, self.class_names)).encode())
        digest.update(self.images[:: -(-len(self.images) // 64)].tobytes())
        digest.update(b"" if self.labels is None else self.labels.tobytes())
        return digest.hexdigest()

    def about(self, config: TrainConfig) -> dict[str, Any]:
        """What a run keeps of its images: name, count, fingerprint, and whether a program gave them, that is, they are
        not what `config.data` names."""
        count, given = len(self.images), self.loaded_as != config.data
        return {"name": self.name, "count": count, "fingerprint": self.fingerprint(), "given": given}

    def batch(self, config: TrainConfig, step: int, generator: torch.Generator, shard: Shard = WHOLE) -> Tensor:
        """Real images of a step's batch: shape (batch / shard.count, channels, size, size), float32 in [-1, 1].

        The parts of a batch, put together, are the whole: draws are made for all of it.
        """
        shift = self.shift if config.shift is None else config.shift
        images = self._gather(self._chosen(config, step)[shard.of(config.batch_size)])
        images = augment(images, flip=config.flip, shift=shift, generator=generator, shard=shard)
        return to_float(images)

    def _gather(self, chosen: np.ndarray) -> Tensor:
        if self._resident is None:
            return torch.from_numpy(self.images[chosen])
        return self._resident[torch.from_numpy(chosen).to(self._resident.device)]

    def reside_on(self, device: torch.device) -> None:
        """From now on `batch` gathers and augments on `device`, if that is a GPU with room for the images.

        The batches are the same.
        """
        if self._resident is None and self.images.nbytes <= _room(device):
            self._resident = torch.from_numpy(self.images).to(device)

    def batch_labels(self, config: TrainConfig, step: int, shard: Shard = WHOLE) -> tuple[Tensor, Tensor]:
        """The labels of a step's images, int64, and which of them training may know, bool: shapes (batch / count,).

        Raises UserError for data without labels, and as `known`.
        """
        labels = self._need_labels()
        chosen = self._chosen(config, step)[shard.of(config.batch_size)]
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
        """Numbers of the images of a step: the step-th batch of an endless stream of shuffled passes.

        Batches may lie across two passes, so each pass has every image once, whatever the batch size. Where labels are
        known in part, two streams take turns, of the images with a label and of those without: every batch, and every
        part of one, is half of either, up to one image where it is odd.
        """
        key = config.seed, config.labels
        if key not in self._streams:
            known = np.ones(len(self.images), bool) if config.labels is None else self.known(config)
            parts = (np.flatnonzero(known), np.flatnonzero(~known))
            self._streams[key] = [Stream(members, config.seed) for members in parts if len(members)]
        streams = self._streams[key]
        places = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
        rounds, turns = np.divmod(places, len(streams))
        chosen = np.empty_like(places)
        for turn, stream in enumerate(streams):
            chosen[turns == turn] = stream[rounds[turns == turn]]
        return chosen


def augment(images: Tensor, *, flip: bool, shift: int, generator: torch.Generator, shard: Shard = WHOLE) -> Tensor:
    """Each image of (B, C, H, W) mirrored with probability 1/2 and shifted by up to `shift` pixels, edges repeated.

    `images` are that shard of a batch; the draws are those of the whole.
    """
    part, channels, height, width = images.shape
    batch = part * shard.count
    draws = torch.randint(-shift, shift + 1, (2, batch, 1), generator=generator)[:, shard.of(batch)]
    if shift:
        rows = (torch.arange(height) + draws[0]).clamp(0, height - 1)
        columns = (torch.arange(width) + draws[1]).clamp(0, width - 1)
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(part, 1, -1).to(images.device)
        images = images.flatten(2).gather(2, pixels.expand(-1, channels, -1)).view_as(images)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator)[shard.of(batch)] < 0.5
        images = torch.where(mirrored[..., None, None].to(images.device), images.flip(3), images)
    return images


def _room(device: torch.device) -> int:
    """Bytes of images that may reside on a GPU: a quarter of its free memory, the rest is for training."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0
