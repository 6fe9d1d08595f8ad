"""Distances between two sets of features, (N, D) and (M, D), computed in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpkernels._checks import check_count, check_floating, fail

_ROWS = 1024


class Kid(NamedTuple):
    value: float  # mean over the subsets
    spread: float  # standard deviation over the subsets
    subsets: int
    size: int


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def gaussian_frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """||m - m'||^2 + tr(S + S' - 2 (S S')^(1/2)), the squared 2-Wasserstein distance of two Gaussians (Dowson and
    Landau 1982; Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the roots of the eigenvalues of S^(1/2) S' S^(1/2), which is symmetric: no
    complex square root, and singular covariances are no special case.
    """
    mean, covariance, other_mean, other_covariance = (
        x.double() for x in (mean, covariance, other_mean, other_covariance)
    )
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0)
    gap = (mean - other_mean).square().sum()
    return (gap + covariance.trace() + other_covariance.trace() - 2 * product.sqrt().sum()).item()


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """The Frechet distance of Gaussians with the features' means and (unbiased) covariances.

    Its expectation at N samples lies above its limit. Raises ValueError for fewer than D + 1 samples of either
    set, from which a D x D covariance cannot be estimated.
    """
    _check(real, fake, real.shape[-1] + 1, "samples, one more than there are features")
    real, fake = real.double(), fake.double()
    return gaussian_frechet(real.mean(0), torch.cov(real.T), fake.mean(0), torch.cov(fake.T))


def kid(real: Tensor, fake: Tensor, *, subsets: int = 100, size: int | None = None, seed: int = 0) -> Kid:
    """Kernel inception distance: the unbiased squared maximum mean discrepancy with k(x, y) = (x.y/D + 1)^3
    (Binkowski et al. 2018, section 4), mean and standard deviation over random subsets of both sets.

    size: samples in a subset, drawn without replacement; None is 1000, or half of the smaller set if that is less,
    so that subsets differ. The value is unbiased at any size, and may be below 0. Raises ValueError for a size
    below 2 or above the smaller set.

    All subsets' sums come from one pass over the kernel matrices in blocks of rows, O(N) memory.
    """
    _check(real, fake, 2, "samples")
    smallest = min(len(real), len(fake))
    size = min(1000, max(2, smallest // 2)) if size is None else check_count("size", size)
    check_count("subsets", subsets)
    if not 2 <= size <= smallest:
        raise fail("size", f"2 to {smallest}, the smaller set", size)
    real, fake = real.double(), fake.double()
    generator = torch.Generator().manual_seed(seed)
    chosen = [_subsets(len(x), subsets, size, generator).to(x) for x in (real, fake)]
    within = [
        (_sums(x, x, w, w) - w @ (x.square().sum(1) / x.shape[1] + 1) ** 3) / (size * (size - 1))
        for x, w in zip((real, fake), chosen, strict=True)
    ]
    values = within[0] + within[1] - 2 * _sums(real, fake, *chosen) / size**2
    return Kid(values.mean().item(), values.std(correction=0).item(), subsets, size)


def _subsets(count: int, subsets: int, size: int, generator: torch.Generator) -> Tensor:
    """(subsets, count): 1 where a sample is in a subset."""
    members = torch.zeros(subsets, count)
    for row in members:
        row[torch.randperm(count, generator=generator)[:size]] = 1
    return members


def _sums(x: Tensor, y: Tensor, x_members: Tensor, y_members: Tensor) -> Tensor:
    """(subsets,): the sum of k over the pairs of each subset."""
    total = torch.zeros(len(x_members), dtype=x.dtype, device=x.device)
    for part, members in zip(x.split(_ROWS), x_members.split(_ROWS, 1), strict=True):
        kernel = (part @ y.T / x.shape[1] + 1) ** 3
        total += (members * (y_members @ kernel.T)).sum(1)
    return total


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eqs. 1 and 2): the share of fake samples within the
    union of balls around the real ones, each reaching to its k-th nearest neighbour among them, and the reverse.

    Raises ValueError for k + 1 samples or fewer in either set.
    """
    check_count("k", k)
    _check(real, fake, k + 2, f"samples for k = {k}")
    return PrecisionRecall(share_inside(fake, real, k), share_inside(real, fake, k))


def share_inside(points: Tensor, centres: Tensor, k: int = 3) -> float:
    """The share of `points` within the union of balls around `centres` that reach to their k-th nearest neighbour:
    precision of fake points among real centres, recall of real points among fake ones."""
    points, centres = points.double(), centres.double()
    radii = torch.cat([_squared(part, centres).kthvalue(k + 1, dim=1).values for part in centres.split(_ROWS)])
    inside = [(_squared(part, centres) <= radii).any(1) for part in points.split(_ROWS)]
    return torch.cat(inside).double().mean().item()


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """(N, M): squared Euclidean distances."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def _check(real: Tensor, fake: Tensor, least: int, of_what: str) -> None:
    for name, features in (("real", real), ("fake", fake)):
        check_floating(name, features)
        if features.dim() != 2:
            raise fail(name, "features of shape (N, D)", f"shape {tuple(features.shape)}")
        if len(features) < least:
            raise fail(name, f"at least {least} {of_what}", len(features))
    if real.shape[1] != fake.shape[1]:
        raise fail("fake", f"{real.shape[1]} features, as real has", fake.shape[1])
