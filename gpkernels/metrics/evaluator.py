"""Measuring a sampler against real images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpkernels._checks import check_count, fail
from gpkernels.metrics.faces import Box, ONet
from gpkernels.metrics.features import EfficientNetLite0, Extractor, Pixels, extract
from gpkernels.metrics.images import to_bytes
from gpkernels.metrics.inception import Inception
from gpkernels.metrics.table import Metric, Result, Samples, find

SAMPLES = 2000
Sampler = Callable[[int], Tensor]


class Evaluator:
    """Measures samplers against the same real images, whose features are computed once.

    real: (N, C, H, W), C 1 or 3, uint8 or floating point in [-1, 1]; at most `n` of them are used, drawn by `seed`.
    names: metrics of METRICS, or their short names. n: samples drawn from each sampler.
    fid_weights: the file of Inception weights that metrics on Inception features want. face_box: where in an image
    the face detector looks (`faces.CELEBA_BOXES`), None for everywhere. labels: (N,), the real images' labels, for
    `mre` of a conditional generator. reconstructed: images that `mre` reconstructs.

    Everything is a function of the arguments: one seed gives one result, whichever metrics are asked for beside it.
    Raises ValueError for unknown names and for too few images; UserError for a package or file that is missing.
    """

    def __init__(
        self,
        real: Tensor,
        names: Sequence[str],
        *,
        n: int = SAMPLES,
        seed: int = 0,
        device: torch.device | str = "cpu",
        fid_weights: Path | None = None,
        face_box: Box | None = None,
        labels: Tensor | None = None,
        reconstructed: int = 64,
    ) -> None:
        self.rows = list(dict.fromkeys(find(name) for name in names))
        if not self.rows:
            raise fail("names", "at least one metric", "none")
        self.n, self.seed, self.device = check_count("n", n), seed, torch.device(device)
        self.reconstructed = check_count("reconstructed", reconstructed)
        self.face_box = face_box
        real = to_bytes("real", real)
        kept = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:n]
        self.real = real[kept]
        self.labels = None if labels is None else labels[kept]
        for row in self.rows:
            if row.wants == "fid_weights" and fid_weights is None:
                raise fail("fid_weights", f"a file of Inception weights for {row.name}, which none comes with", None)
        self._extractors: dict[str, Extractor] = {}
        self._detector: ONet | None = None
        for row in self.rows:
            self._prepare(row, fid_weights)
            self._check_counts(row)
        self._real_features: dict[str, Tensor] = {}

    def _prepare(self, row: Metric, fid_weights: Path | None) -> None:
        if row.extractor == "onet":
            self._detector = ONet(self.device)
        elif row.extractor and row.extractor not in self._extractors:
            makers: dict[str, Callable[[], Extractor]] = {
                "effnetlite0": lambda: EfficientNetLite0(self.device),
                "inception": lambda: Inception(Path(str(fid_weights)), self.device),
                "pixels": lambda: Pixels(self.real.shape[1:], self.device),
            }
            self._extractors[row.extractor] = makers[row.extractor]()

    def _check_counts(self, row: Metric) -> None:
        extractor = self._extractors.get(row.extractor)
        least = row.least(extractor.dimensions if extractor else 0)
        for name, count in (("n", self.n), ("real", len(self.real))):
            if count < least:
                raise fail(name, f"at least {least} images for {row.name} ({row.why})", count)

    def __call__(
        self,
        sampler: Sampler,
        *,
        generator: Callable[..., Tensor] | None = None,
        nz: int | None = None,
        z: str = "normal",
    ) -> dict[str, Result]:
        """{name: result}, in the order asked for. `sampler(n)` gives n images of the shape of the real ones;
        `generator` is what `mre` inverts, from `nz` numbers of the distribution `z`."""
        for row in self.rows:
            if row.wants == "generator" and (generator is None or nz is None):
                raise fail("generator", f"the generator and nz, which {row.name} inverts", "None")
        fake = to_bytes("sampler", sampler(self.n))
        wanted = (self.n, *self.real.shape[1:])
        if tuple(fake.shape) != wanted:
            raise fail("sampler", f"images of shape {wanted}", tuple(fake.shape))
        fake_features: dict[str, Tensor] = {}

        def features(name: str) -> tuple[Tensor, Tensor]:
            for known, images in ((self._real_features, self.real), (fake_features, fake)):
                if name not in known:
                    known[name] = extract(self._extractors[name], images)
            return self._real_features[name], fake_features[name]

        def face_probability(images: Tensor) -> Tensor:
            assert self._detector is not None
            return self._detector(images, self.face_box)

        samples = Samples(
            self.real,
            fake,
            self.seed,
            self.device,
            features,
            face_probability,
            generator,
            nz,
            z,
            self.labels,
            self.reconstructed,
        )
        return {row.name: self._complete(row, row.measure(samples)) for row in self.rows}

    def _complete(self, row: Metric, result: Result) -> Result:
        extractor: Any = self._detector if row.extractor == "onet" else self._extractors.get(row.extractor)
        notes = [*row.notes, *getattr(extractor, "notes", ())]
        if row.extractor not in ("", "pixels") and self.real.shape[1] == 1:
            notes.append("grey images repeated to three channels: not comparable with numbers on colour images")
        return dataclasses.replace(
            result,
            extractor=extractor.description if extractor else "",
            n=self.n,
            n_real=result.detail.get("images", len(self.real)),
            notes=tuple(notes),
        )


def evaluate(
    sampler: Sampler,
    real: Tensor,
    names: Sequence[str],
    *,
    seed: int = 0,
    generator: Callable[..., Tensor] | None = None,
    nz: int | None = None,
    z: str = "normal",
    **options: Any,
) -> dict[str, float]:
    """{name: value} of `sampler` against `real`; `options` are those of Evaluator, which also gives spread, details
    and notes, and keeps the features of the real images for the next sampler."""
    results = Evaluator(real, names, seed=seed, **options)(sampler, generator=generator, nz=nz, z=z)
    return {name: result.value for name, result in results.items()}
