"""Which training images are nearest to given ones, in pixels: whether a generator repeats what it was shown."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_CHUNK = 2048
_CLOSEST = 0.05


class Nearest(NamedTuple):
    """For each query, (Q,): the number of the nearest image, whether it is nearest mirrored, and how far it is.

    Distances are root mean squares over pixels and channels, in grey levels from 0 to 255.
    """

    number: Tensor
    mirrored: Tensor
    distance: Tensor


def nearest(
    queries: Tensor, images: np.ndarray, *, mirrored: bool, leave_out: Tensor | None = None, device: Any = "cpu"
) -> Nearest:
    """The nearest of `images` (N, C, H, W) to each of `queries` (Q, C, H, W), both uint8.

    `mirrored`: images count as they are and mirrored. `leave_out` (Q,), int64: an image that does not count for each
    query, itself where queries are images of the set.
    """
    leave_out = None if leave_out is None else leave_out.to(device)
    flat = _centred(queries, device)
    sides = [flat, _centred(queries.flip(3), device)] if mirrored else [flat]
    best = torch.full((len(sides), len(queries)), float("inf"), device=device)
    where = torch.zeros(best.shape, dtype=torch.long, device=device)
    for begin in range(0, len(images), _CHUNK):
        chunk = _centred(torch.from_numpy(np.ascontiguousarray(images[begin : begin + _CHUNK])), device)
        squares = chunk.square().sum(1)
        for row, side in enumerate(sides):
            # |q|^2, the same for every image, is left out: only the order counts
            apart = torch.addmm(squares, side, chunk.T, alpha=-2)
            if leave_out is not None:
                inside = (leave_out >= begin) & (leave_out < begin + len(chunk))
                apart[inside, leave_out[inside] - begin] = float("inf")
            value, index = apart.min(1)
            closer = value < best[row]
            best[row] = torch.where(closer, value, best[row])
            where[row] = torch.where(closer, index + begin, where[row])
    side = best.argmin(0).cpu()
    index = where.cpu().gather(0, side[None])[0]
    found = torch.from_numpy(images[index.numpy()])
    found = torch.where((side == 1)[:, None, None, None], found.flip(3), found)
    distance = (queries.double() - found.double()).square().flatten(1).mean(1).sqrt()
    return Nearest(index, side == 1, distance)


def _centred(images: Tensor, device: Any) -> Tensor:
    """Near zero, so that squares of float32 keep their digits."""
    return images.to(device).flatten(1).float() - 127.5


def suspicious(samples: Tensor, real: Tensor) -> tuple[int, float]:
    """How many distances of samples lie below the 5 % quantile of those of real images, and that quantile.

    Samples that are to the training images as other real images are lie below it one time in twenty.
    """
    limit = real.quantile(_CLOSEST).item()
    return int((samples < limit).sum()), limit
