"""What there is to decode, before anything is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gpkernels.errors import UserError
from gpkernels.training.data.sources import Source


@dataclass(frozen=True)
class Cut:
    """The square that is kept of an image: `box` (left, upper, right, lower) of images of `size` (width, height), or
    the largest in the centre."""

    name: str
    box: tuple[int, int, int, int] | None = None
    size: tuple[int, int] | None = None

    def of(self, width: int, height: int) -> tuple[int, int, int, int]:
        if self.size not in (None, (width, height)):
            assert self.size is not None
            raise ValueError(f"wanted {self.size[0]}x{self.size[1]} pixels, got {width}x{height}")
        if self.box is not None:
            return self.box
        side = min(width, height)
        left, upper = (width - side) // 2, (height - side) // 2
        return left, upper, left + side, upper + side


CENTRE = Cut("centre")


@dataclass(frozen=True)
class Attributes:
    """Names of yes-or-no attributes, and which images have them: (N, attributes), bool."""

    names: list[str]
    values: np.ndarray

    def labels(self, attribute: str) -> np.ndarray:
        """(N,), int64: 1 for the images that have it. Raises UserError for an unknown one."""
        if attribute not in self.names:
            raise UserError(f"--label-attribute: wanted one of {', '.join(self.names) or 'none'}, got {attribute!r}")
        return self.values[:, self.names.index(attribute)].astype(np.int64)


@dataclass(frozen=True)
class Listing:
    """What there is to decode, before anything is.

    members: (N,), numbers in `source`, ascending. stamp: changes with the source's content. labels: (N,), int64.
    attributes: reads those of the members; None where there are none, and UserError where they are damaged.
    """

    name: str
    source: Source
    members: np.ndarray
    cut: Cut
    stamp: str
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    attributes: Callable[[], Attributes | None] = field(default=lambda: None)
    no_attributes: str = "data with attributes"

    def __len__(self) -> int:
        return len(self.members)

    def chunks(self) -> list[range]:
        return self.source.chunks(self.members.tolist())
