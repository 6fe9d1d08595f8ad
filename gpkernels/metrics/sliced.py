"""Sliced Wasserstein distances: of whole images, and of patches on the levels of a Laplacian pyramid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels._checks import check_count, check_floating, fail

_CHUNK = 32  # directions at a time
_COARSEST = 16


def sliced_wasserstein(real: Tensor, fake: Tensor, *, directions: int = 512, seed: int = 0) -> float:
    """The mean 1-Wasserstein distance of the samples' projections on random unit directions (Rabin et al. 2011).

    real, fake: (N, ...) and (M, ...), flattened per sample; N and M may differ. float32, or float64 for float64.
    """
    check_floating("real", real)
    check_floating("fake", fake)
    if real.shape[1:] != fake.shape[1:]:
        raise fail("fake", f"samples of shape {tuple(real.shape[1:])}, as real has", tuple(fake.shape[1:]))
    check_count("directions", directions)
    return _sliced(real.flatten(1), fake.flatten(1), directions, torch.Generator().manual_seed(seed))


def pyramid_wasserstein(
    real: Tensor, fake: Tensor, *, patches: int = 128, directions: int = 512, seed: int = 0
) -> dict[int, float]:
    """{size: distance}, one a level of the Laplacian pyramid down to 16x16: 1000 times the sliced Wasserstein distance
    of 7x7 patches, `patches` an image at random places, each set normalised to mean 0 and deviation 1 per channel
    (Karras et al. 2018, section 5; theirs are of 16384 images).

    real, fake: (N, C, S, S) and (M, C, S, S), float, S a power of two times 16. Raises ValueError for other sizes.
    """
    for name, images in (("real", real), ("fake", fake)):
        check_floating(name, images)
        if images.dim() != 4 or images.shape[2] != images.shape[3] or not _halves_to_16(images.shape[2]):
            raise fail(name, "square images of 16, 32, 64, ... pixels", f"shape {tuple(images.shape)}")
    if real.shape[1:] != fake.shape[1:]:
        raise fail("fake", f"images of shape {tuple(real.shape[1:])}, as real has", tuple(fake.shape[1:]))
    check_count("patches", patches)
    check_count("directions", directions)
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for real_level, fake_level in zip(laplacian_pyramid(real), laplacian_pyramid(fake), strict=True):
        real_patches, fake_patches = (_patches(level, patches, generator) for level in (real_level, fake_level))
        result[real_level.shape[2]] = 1e3 * _sliced(real_patches, fake_patches, directions, generator)
    return result


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """Band-pass images of each size, finest first, and the low-pass image of 16x16 (Burt and Adelson 1983): each
    level and the enlarged next coarser image add up to the image."""
    levels = []
    while images.shape[2] > _COARSEST:
        smaller = _blur(images)[:, :, ::2, ::2]
        levels.append(images - enlarge(smaller))
        images = smaller
    return [*levels, images]


def enlarge(images: Tensor) -> Tensor:
    spread = images.new_zeros(*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3])
    spread[:, :, ::2, ::2] = images
    return _blur(spread) * 4


def _blur(images: Tensor) -> Tensor:
    """The binomial filter (1, 4, 6, 4, 1)/16 in both directions, edges mirrored."""
    line = images.new_tensor([1, 4, 6, 4, 1]) / 16
    channels = images.shape[1]
    images = F.conv2d(F.pad(images, (2, 2, 0, 0), "reflect"), line.expand(channels, 1, 1, 5), groups=channels)
    return F.conv2d(F.pad(images, (0, 0, 2, 2), "reflect"), line[:, None].expand(channels, 1, 5, 1), groups=channels)


def _patches(images: Tensor, patches: int, generator: torch.Generator, side: int = 7) -> Tensor:
    count, _, size, _ = images.shape
    corners = torch.randint(0, size - side + 1, (2, count, patches, 1), generator=generator).to(images.device)
    rows, columns = corners + torch.arange(side, device=images.device)
    picture = torch.arange(count, device=images.device)[:, None, None, None]
    picked = images.movedim(1, -1)[picture, rows[..., :, None], columns[..., None, :]].flatten(0, 1)
    deviation, mean = torch.std_mean(picked, dim=(0, 1, 2), correction=0)
    return ((picked - mean) / deviation.clamp_min(1e-8)).flatten(1)


def _sliced(real: Tensor, fake: Tensor, directions: int, generator: torch.Generator) -> float:
    total = 0.0
    for start in range(0, directions, _CHUNK):
        draws = torch.randn(real.shape[1], min(_CHUNK, directions - start), generator=generator, dtype=torch.float64)
        chosen = (draws / draws.norm(dim=0)).to(real)
        total += wasserstein((real @ chosen).T, (fake @ chosen).T).double().sum().item()
    return total / directions


def wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """(K,): 1-Wasserstein distances of the rows of (K, N) and (K, M), the integral of |F_x - F_y|."""
    x, y = _sort(x), _sort(y)
    if x.shape == y.shape:
        return (x - y).abs().mean(1)
    points = _sort(torch.cat([x, y], 1))
    ends = points[:, :-1].contiguous()
    below = [torch.searchsorted(z, ends, right=True).to(z.dtype) / z.shape[1] for z in (x, y)]
    return ((below[0] - below[1]).abs() * points.diff(dim=1)).sum(1)


def _sort(x: Tensor) -> Tensor:
    """Sorted rows: by numpy on the CPU, whose vectorised sort takes a twentieth of the time of torch's."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    import numpy as np

    return torch.from_numpy(np.sort(x.detach().contiguous().numpy(), axis=1))


def _halves_to_16(size: int) -> bool:
    return size >= _COARSEST and size % _COARSEST == 0 and (size // _COARSEST).bit_count() == 1
