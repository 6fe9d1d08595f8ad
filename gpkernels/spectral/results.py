"""Normalised weights that several reads share: those that an update made, and those of reads that none came before."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpkernels.ops.spectral_norm.autograd import Sigmas, Updated, spectral_attach
from gpkernels.spectral.portable import State

if TYPE_CHECKING:
    from gpkernels.spectral.parametrization import SpectralNorm


class Update:
    """What an update of u and v leaves of its layers: sigma, and in training the normalised weights, for any number of
    reads in the state that it left. The first read with gradients gives all of them one node, which the forwards of a
    step then share."""

    __slots__ = ("_lock", "_moved", "_parts", "_scaling", "groups", "members", "sigmas", "values")

    def __init__(self, members: Sequence[SpectralNorm], lock: threading.RLock) -> None:
        self.members, self._lock = [weakref.ref(m) for m in members], lock
        self.groups: list[list[int]] = []
        self.sigmas: Sigmas = []
        self.values: list[Tensor | None] = [None] * len(members)
        self._parts: list[Updated] = []
        self._moved: dict[int, tuple[Tensor, int]] = {}

    def measured(self, groups: list[list[int]], sigmas: Sigmas) -> None:
        self.groups, self.sigmas = groups, sigmas

    def normalised(self, parts: list[Updated], weights: list[Tensor], targets: list[float], eps: float) -> None:
        self.measured([part.indices for part in parts], [part.sigma for part in parts])
        self._parts, self._scaling = parts, (weights, targets, eps)
        for part in parts:
            self._set(part, part.normalised())

    def _set(self, part: Updated, values: list[Tensor]) -> None:
        for i, value in zip(part.indices, values, strict=True):
            self.values[i] = value

    def place(self, index: int) -> tuple[Tensor, int]:
        """Where a layer's sigma is: a tensor and an index in it."""
        if index in self._moved:
            return self._moved[index]
        return next((s, i.index(index)) for i, s in zip(self.groups, self.sigmas, strict=True) if index in i)

    def copy_sigma(self, index: int, place: tuple[Tensor, int]) -> None:
        """To where a captured graph will look for it."""
        sigma, at = self.place(index)
        if sigma.device == place[0].device:
            place[0][place[1]].copy_(sigma[at])
            self._moved[index] = place

    def read(self, index: int, grads: bool) -> Tensor | None:
        """None where the layer has none that serves this read, or somebody has written to it."""
        value = self.values[index]
        if value is None or value._version:
            return None
        if not grads:
            return value.detach()
        if not value.requires_grad:
            with self._lock:
                self._attach()
            value = self.values[index]
        return value if value is not None and value.requires_grad else None

    def drop(self, index: int) -> None:
        self.values[index] = None

    def _attach(self) -> None:
        parts, self._parts = self._parts, []
        for part in parts:
            dropped = [i for i in part.indices if self.values[i] is None]
            self._set(part, spectral_attach(part, *self._scaling))
            for i in dropped:
                self.values[i] = None


class Result:
    """A normalised weight for the next read, and the state it was made in.

    `kept` serves any number of reads. Another one waits for one read; where that has gradients, in training mode, it
    then serves others, so that the forwards of a step have one node: of new layers and copies as long as a graph keeps
    it alive, else until the next step of any optimizer.
    """

    __slots__ = ("captured", "kept", "ref", "state", "value", "version")

    def __init__(self, value: Tensor, state: State, captured: bool, kept: bool) -> None:
        self.value: Tensor | None = value
        self.ref = weakref.ref(value)
        self.version = 0 if value.is_inference() else value._version
        self.state, self.captured, self.kept = state, captured, kept

    @property
    def waits(self) -> bool:
        return not self.kept and self.value is not None

    def right(self, state: State) -> Tensor | None:
        """The value, if it is right in this state."""
        value = self.value
        if value is None:
            value = self.ref()
            if value is None:
                return None
            value._fix_weakref()  # type: ignore[attr-defined]
        if self.state != state or self.captured != capturing(value):
            return None
        usable = torch.is_inference_mode_enabled() if value.is_inference() else value._version == self.version
        return value if usable else None


def capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
