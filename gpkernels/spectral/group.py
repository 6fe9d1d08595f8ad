"""The layers that are normalised together: one call for all, shared by the forwards of a step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.spectral_norm.autograd import (
    Sigmas,
    by_layer,
    groups_of,
    spectral_iterate,
    spectral_scale,
)
from gpkernels.spectral import steps
from gpkernels.spectral.portable import State
from gpkernels.spectral.vectors import copies, fresh, misfits, units

if TYPE_CHECKING:
    from gpkernels.spectral.parametrization import SpectralNorm


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
        if self.state != state or self.captured != _capturing(value):
            return None
        usable = torch.is_inference_mode_enabled() if value.is_inference() else value._version == self.version
        return value if usable else None


class Group:
    """Layers with the same `iterations` and `eps`. It holds them weakly; copied or unpickled, a group starts anew with
    the layers that were copied with it.

    A read computes other layers too. Where nothing is known (`SpectralNorm.is_known`) these are the ones registered
    after it, whose results the same pass is going to take, once each: a later pass, which starts with an earlier layer,
    makes them anew.
    """

    def __init__(self, iterations: int, eps: float) -> None:
        self.iterations, self.eps = iterations, eps
        self._start()

    def _start(self) -> None:
        self._members: list[weakref.ref[SpectralNorm]] = []
        self._lock = threading.RLock()
        self._last: tuple[list[weakref.ref[SpectralNorm]], Sigmas] | None = None
        self._graph_reads_sigma = False
        steps.watch(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"iterations": self.iterations, "eps": self.eps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def add(self, member: SpectralNorm) -> None:
        with self._lock:
            self._members.append(weakref.ref(member))

    def watched(self) -> list[tuple[SpectralNorm, Tensor]]:
        """The layers that are in use, each with its weight."""
        found, dead = [], False
        for reference in self._members:
            member = reference()
            if member is None:
                dead = True
            else:
                weight = member.original()
                if weight is not None:
                    found.append((member, weight))
        if dead:
            with self._lock:
                self._members = [r for r in self._members if r() is not None]
        return found

    @torch.no_grad()
    def update(self, members: Sequence[SpectralNorm], iterations: int | None = None) -> None:
        """Moves u and v of these layers, and keeps their sigma. iterations=0 only measures it."""
        with self._lock:
            weights, u, v, dims = [], [], [], []
            for member in members:
                weight = member.original()
                assert weight is not None
                member.fit(weight)
                own_u, own_v = member.uv()
                weights.append(weight)
                u.append(own_u)
                v.append(own_v)
                dims.append(member.dim)
            iterations = self.iterations if iterations is None else iterations
            sigmas = spectral_iterate(weights, u, v, dims, iterations, self.eps)
            now = steps.tick()
            for indices, sigma in zip(groups_of(weights), sigmas, strict=True):
                for at, i in enumerate(indices):
                    known, place = members[i].known, (sigma, at)
                    if self._graph_reads_sigma and known.sigma is not None and known.sigma[0].device == sigma.device:
                        place = known.sigma  # where the graph will look for it
                        place[0][place[1]].copy_(sigma[at])
                    members[i].remember(weights[i], place)
                    known.at, known.fresh = now, False
            self._last = None if self._graph_reads_sigma else ([weakref.ref(m) for m in members], sigmas)

    stepped = update

    @torch.no_grad()
    def settle(self, members: Sequence[SpectralNorm]) -> None:
        """Gives layers whose weights were changed between steps other vectors: fresh ones anyway, so that ranks that
        were given one weight have one u and v, others if theirs do not fit. In place."""
        doubtful = []
        for member in members:
            weight, before = member.original(), member.known.state
            if weight is None or weight.is_meta or _capturing(weight):
                continue
            if member.known.fresh:
                member.restart(weight.detach())
            elif before is None or (now := member.state(weight)) is None or now[1:] == before[1:]:
                doubtful.append((member, weight.detach()))
        if doubtful:
            wrong = self._misfits([m for m, _ in doubtful], [w for _, w in doubtful])
            for i in wrong:
                doubtful[i][0].restart(doubtful[i][1])

    def read(self, member: SpectralNorm, weight: Tensor) -> Tensor:
        """The normalised weight of a layer, computed with those of all layers that the same pass will ask for."""
        state = member.state(weight)
        if state is None or weight is not member.original():
            return self._compute([member], [weight], False)[0]
        with self._lock:
            grads = torch.is_grad_enabled() and weight.requires_grad
            found = member.take(grads, state)
            if found is None:
                found = self._make(member, weight, state, grads)
            return found

    def _make(self, member: SpectralNorm, weight: Tensor, state: State, grads: bool) -> Tensor:
        known = member.is_known(state)
        batch, reached, waiting = [], known, False
        for m, w in self.watched():
            reached |= m is member
            if not reached or (torch.is_grad_enabled() and w.requires_grad) != grads:
                continue
            s = state if m is member else m.state(w)
            if s is None or m.is_known(s) != known:
                continue
            result = None if m is member else m.known.results.get(grads)
            if result is not None and result.right(s) is not None:
                if not result.waits:
                    continue
                waiting = True
            batch.append((m, w, s))
        captured = _capturing(weight)
        self._graph_reads_sigma |= captured
        spent = member.known.spent
        if waiting and spent is not None and not captured:  # again in one pass, if the weight is still the same
            (value,) = self._compute([member], [weight], False)
            again = member.known.spent
            if again is not None and torch.equal(spent, again):
                return value
        values = self._compute([m for m, _, _ in batch], [w for _, w, _ in batch], known)
        kept = known and not self._graph_reads_sigma
        for (m, _, s), value in zip(batch, values, strict=True):
            if not kept:
                m.known.results.clear()
            m.known.results[grads] = Result(value, s, captured, kept)
        found = member.take(grads, state)
        if found is None:  # another thread, of an optimizer's step say, has dropped the results meanwhile
            found = next(value for (m, _, _), value in zip(batch, values, strict=True) if m is member)
        return found

    def _compute(self, members: list[SpectralNorm], weights: list[Tensor], known: bool) -> list[Tensor]:
        """W target / sigma; `known` where the layers' sigma belongs to their state."""
        grads = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        if known:
            u, v = map(list, zip(*[m.uv() for m in members], strict=True))
            sigmas = self._known_sigmas(members, weights)
            if grads:  # the backward's own: DDP may write the buffers before it, with the same values
                both = copies([*u, *v])
                u, v = both[: len(u)], both[len(u) :]
        else:
            u, v, sigmas = self.measured(members, weights)
            for m, sigma in zip(members, by_layer(weights, sigmas), strict=True):
                m.known.spent = sigma
        dims, targets = [m.dim for m in members], [m.target for m in members]
        return spectral_scale(weights, u, v, sigmas, dims, targets, self.eps)

    @torch.no_grad()
    def measured(
        self, members: Sequence[SpectralNorm], weights: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Sigmas]:
        """Copies of u and v of length 1, and sigma; new ones where they belong to another weight, which is not asked of
        the weight of the last update."""
        plain, dims = [w.detach() for w in weights], [m.dim for m in members]
        u, v = self._units(members, plain)
        sigmas = spectral_iterate(plain, u, v, dims, 0, self.eps)
        some = [i for i, (m, w) in enumerate(zip(members, weights, strict=True)) if not m.is_last(w)]
        if some and not _capturing(plain[0]):
            found = misfits(plain, u, v, dims, self.eps, sigmas)
            wrong = [i for i in found if i in some]
            if wrong:
                new = fresh([plain[i] for i in wrong], [dims[i] for i in wrong], self.eps)
                for i, new_u, new_v in zip(wrong, *new, strict=True):
                    u[i], v[i] = new_u, new_v
                sigmas = spectral_iterate(plain, u, v, dims, 0, self.eps)
        return u, v, sigmas

    def _misfits(self, members: Sequence[SpectralNorm], plain: list[Tensor]) -> list[int]:
        u, v = self._units(members, plain)
        dims = [m.dim for m in members]
        return misfits(plain, u, v, dims, self.eps, spectral_iterate(plain, u, v, dims, 0, self.eps))

    @staticmethod
    def _units(members: Sequence[SpectralNorm], weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        dtypes = [accumulation_dtype(w.dtype) for w in weights]
        vectors = [m.uv()[i].to(dtype) for i in (0, 1) for m, dtype in zip(members, dtypes, strict=True)]
        both = units(vectors)
        return both[: len(dtypes)], both[len(dtypes) :]

    def _known_sigmas(self, members: list[SpectralNorm], weights: list[Tensor]) -> Sigmas:
        if self._last is not None:
            last, sigmas = self._last
            if len(last) == len(members) and all(r() is m for r, m in zip(last, members, strict=True)):
                return sigmas
        found = [place[0][place[1]] for m in members if (place := m.known.sigma) is not None]
        return [torch.stack([found[i] for i in indices]) for indices in groups_of(weights)]


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
