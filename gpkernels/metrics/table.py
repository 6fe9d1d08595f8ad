"""The metrics as a table: what each measures, what it needs, which way is better, and where it is from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gpkernels._checks import fail
from gpkernels.metrics import distances, faces
from gpkernels.metrics.reconstruction import minimum_reconstruction_error
from gpkernels.metrics.sliced import pyramid_wasserstein, sliced_wasserstein
from gpkernels.pixels import to_float


@dataclass(frozen=True)
class Result:
    """A metric's value, its spread where it has one, and what to say beside it."""

    value: float
    spread: float | None = None
    spread_of: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    extractor: str = ""
    n: int = 0
    n_real: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Samples:
    """What a measurement sees. `features(name)` gives an extractor's features of (real, fake)."""

    real: Tensor  # uint8
    fake: Tensor  # uint8
    seed: int
    device: torch.device
    features: Callable[[str], tuple[Tensor, Tensor]]
    face_probability: Callable[[Tensor], Tensor]
    generator: Callable[..., Tensor] | None
    nz: int | None
    z: str
    labels: Tensor | None
    reconstructed: int

    def floats(self) -> tuple[Tensor, Tensor]:
        return to_float(self.real.to(self.device)), to_float(self.fake.to(self.device))


@dataclass(frozen=True)
class Metric:
    """`measure(samples)` gives the Result; `least(dimensions)` is the fewest images of a set it makes sense for."""

    name: str
    better: str  # "lower" or "higher"
    measure: Callable[[Samples], Result]
    doc: str
    source: str
    extractor: str = ""  # whose features it compares
    wants: str = ""  # the option it cannot do without
    least: Callable[[int], int] = lambda dimensions: FEW
    why: str = "fewer say nothing"
    notes: tuple[str, ...] = ()


FEW = 100
"""The fewest images of either set that most metrics take."""


@dataclass(frozen=True)
class _Distance:
    better: str
    between: Callable[[Tensor, Tensor, int], Result]  # of features real, fake, and a seed
    doc: str
    source: str
    least: Callable[[int], int] = lambda dimensions: FEW
    why: str = "fewer say nothing"
    notes: tuple[str, ...] = ()


def _kid(real: Tensor, fake: Tensor, seed: int) -> Result:
    got = distances.kid(real, fake, seed=seed)
    detail = {"subsets": got.subsets, "size": got.size}
    return Result(got.value, got.spread, f"standard deviation over {got.subsets} subsets of {got.size}", detail)


def _share(points: Tensor, centres: Tensor) -> Result:
    share = distances.share_inside(points, centres)
    return Result(share, _binomial(share, len(points)), "binomial standard error")


def _binomial(share: float, count: int) -> float:
    return (share * (1 - share) / count) ** 0.5


_SIZE_MATTERS = "all but KID, face rate and mre change with the number of images: compare them at the same n only"

_DISTANCES = {
    "kid": _Distance("lower", _kid, "kernel inception distance, unbiased at any n", "Binkowski et al. 2018, section 4"),
    "fd": _Distance(
        "lower",
        lambda real, fake, seed: Result(distances.frechet_distance(real, fake)),
        "Frechet distance of Gaussians, biased upwards at small n",
        "Heusel et al. 2017, eq. 6",
        lambda dimensions: dimensions + 1,
        "a covariance of its features needs one image more than there are features; KID does with fewer",
        (_SIZE_MATTERS,),
    ),
    "precision": _Distance(
        "higher",
        lambda real, fake, seed: _share(fake, real),
        "share of fakes among the real ones",
        "Kynkaanniemi et al. 2019, eqs. 1 and 2, k = 3",
        notes=(_SIZE_MATTERS,),
    ),
    "recall": _Distance(
        "higher",
        lambda real, fake, seed: _share(real, fake),
        "share of real ones among the fakes",
        "Kynkaanniemi et al. 2019, eqs. 1 and 2, k = 3",
        notes=(_SIZE_MATTERS,),
    ),
}
_EXTRACTORS = {"effnetlite0": "", "inception": "fid_weights", "pixels": ""}  # and the option each wants


def _name(distance: str, extractor: str) -> str:
    return "fid" if (distance, extractor) == ("fd", "inception") else f"{distance}_{extractor}"


def _row(distance: str, extractor: str) -> Metric:
    row = _DISTANCES[distance]
    return Metric(
        _name(distance, extractor),
        row.better,
        lambda samples: row.between(*samples.features(extractor), samples.seed),
        row.doc,
        row.source,
        extractor,
        _EXTRACTORS[extractor],
        row.least,
        row.why,
        row.notes,
    )


def _swd(samples: Samples) -> Result:
    return Result(sliced_wasserstein(*samples.floats(), seed=samples.seed), detail={"directions": 512})


def _swd_pyramid(samples: Samples) -> Result:
    levels = pyramid_wasserstein(*samples.floats(), seed=samples.seed)
    return Result(sum(levels.values()) / len(levels), detail={"levels": levels})


def _face_rate(samples: Samples) -> Result:
    fake, real = (
        (samples.face_probability(images) > 0.5).double().mean().item() for images in (samples.fake, samples.real)
    )
    return Result(fake, _binomial(fake, len(samples.fake)), "binomial standard error", {"real": real})


def _reconstruction(samples: Samples) -> Result:
    assert samples.generator is not None
    assert samples.nz is not None
    images = to_float(samples.real[: samples.reconstructed].to(samples.device))
    labels = None if samples.labels is None else samples.labels[: len(images)]
    errors = minimum_reconstruction_error(
        samples.generator, images, samples.nz, z=samples.z, labels=labels, seed=samples.seed
    )
    errors = errors.cpu().double()
    error_of_mean = errors.std().item() / len(errors) ** 0.5 if len(errors) > 1 else None
    detail = {
        "images": len(errors),
        "root_mean_square": errors.mean().item() / images[0].numel() ** 0.5,
        "per_image": errors.tolist(),
    }
    return Result(errors.mean().item(), error_of_mean, "standard error over images", detail)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        row.name: row
        for row in (
            *(_row(distance, extractor) for extractor in _EXTRACTORS for distance in _DISTANCES),
            Metric(
                "swd",
                "lower",
                _swd,
                "sliced Wasserstein distance of whole images, no network",
                "Rabin et al. 2011",
                notes=(_SIZE_MATTERS,),
            ),
            Metric(
                "swd_pyramid",
                "lower",
                _swd_pyramid,
                "1000 x sliced Wasserstein distance of patches, mean over the levels of a Laplacian pyramid",
                "Karras et al. 2018, section 5",
                notes=(_SIZE_MATTERS,),
            ),
            Metric(
                "mre",
                "lower",
                _reconstruction,
                "Minimum Reconstruction Error, mean of min_z ||x - G(z)|| (slow)",
                "Qi 2020",
                wants="generator",
                least=lambda dimensions: 1,
                notes=("mre is an upper bound, found by 100 steps from 3 starts",),
            ),
            Metric(
                "face_rate_onet",
                "higher",
                _face_rate,
                "share of fakes that MTCNN's last network takes for faces",
                "Zhang et al. 2016",
                extractor="onet",
                notes=faces.NOTES,
            ),
        )
    }
)
"""Every metric, by name."""

SHORT: Mapping[str, str] = MappingProxyType(
    {**{distance: _name(distance, "effnetlite0") for distance in _DISTANCES}, "face_rate": "face_rate_onet"}
)
"""Short names and what they stand for."""


def find(name: str) -> Metric:
    """The row of a full or short name. Raises ValueError, which lists the names."""
    full = SHORT.get(name, name)
    if full not in METRICS:
        raise fail("metrics", "one of " + ", ".join([*METRICS, *SHORT]), repr(name))
    return METRICS[full]
