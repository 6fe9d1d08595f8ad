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
    spectral_update,
)
from gpkernels.spectral import results, steps
from gpkernels.spectral.portable import State, vectors_of
from gpkernels.spectral.results import Result, Update
from gpkernels.spectral.vectors import fresh, misfits, units

if TYPE_CHECKING:
    from gpkernels.spectral.parametrization import SpectralNorm


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
        self._last: Update | None = None
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
        """Moves u and v of these layers, and keeps their sigma and, in training mode, the normalised weights.
        iterations=0 only measures sigma."""
        with self._lock:
            iterations, now = self.iterations if iterations is None else iterations, steps.tick()
            update, training, self._last = Update(members, self._lock), True, None
            weights, u, v, dims, targets = [], [], [], [], []
            places: dict[int, tuple[Tensor, int]] = {}
            try:
                for i, member in enumerate(members):
                    weight, known = member.original(), member.known
                    assert weight is not None
                    own_u, own_v = member.uv()
                    if own_u.dtype is not accumulation_dtype(weight.dtype):
                        member.fit(weight)
                        own_u, own_v = member.uv()
                    weights.append(weight)
                    u.append(own_u)
                    v.append(own_v)
                    dims.append(member.dim)
                    targets.append(member.target)
                    if self._graph_reads_sigma and known.update is not None:
                        places[i] = known.update.place(known.index)
                    training &= member.training
                    member.remember(weight, iterations > 0)  # which lets old results go before new ones need memory
                    known.update, known.index, known.at, known.fresh = update, i, now, False
                eager = training and not (self._graph_reads_sigma or results.capturing(weights[0]))
                if eager and not torch.is_inference_mode_enabled():
                    parts = spectral_update(weights, u, v, dims, targets, iterations, self.eps)
                    update.normalised(parts, weights, targets, self.eps)
                else:
                    sigmas = spectral_iterate(weights, u, v, dims, iterations, self.eps)
                    update.measured(groups_of(weights), sigmas)
            except BaseException:
                for member in members:
                    member.known.forget()
                raise
            for indices in update.groups:
                if members[indices[0]].known.state != members[indices[0]].state(weights[indices[0]]):
                    for i in indices:  # of a backend that moves versions by another number
                        members[i].known.state = members[i].state(weights[i])
            for i, place in places.items():
                update.copy_sigma(i, place)
            self._last = None if self._graph_reads_sigma else update

    stepped = update

    @torch.no_grad()
    def settle(self, members: Sequence[SpectralNorm]) -> None:
        """Gives layers whose weights were changed between steps other vectors: fresh ones anyway, so that ranks that
        were given one weight have one u and v, others if theirs do not fit. In place."""
        doubtful = []
        for member in members:
            weight, before = member.original(), member.known.state
            if weight is None or weight.is_meta or results.capturing(weight):
                continue
            if member.known.fresh:
                member.restart(weight.detach())
            elif before is None or (now := member.state(weight)) is None or vectors_of(now) == vectors_of(before):
                doubtful.append((member, weight.detach()))
        if doubtful:
            wrong = self._misfits([m for m, _ in doubtful], [w for _, w in doubtful])
            for i in wrong:
                doubtful[i][0].restart(doubtful[i][1])

    def read(self, member: SpectralNorm, weight: Tensor) -> Tensor:
        """The normalised weight of a layer that no update has normalised, computed with those of all layers that the
        same pass will ask for."""
        state = member.state(weight)
        if state is None or weight is not member.original():
            return self._compute([member], [weight], False)[0]
        with self._lock:
            grads = torch.is_grad_enabled() and weight.requires_grad
            found = member.take(grads, state)
            return self._make(member, weight, state, grads) if found is None else found

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
        captured = results.capturing(weight)
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
        if known:
            u, v = map(list, zip(*[m.uv() for m in members], strict=True))
            sigmas = self._known_sigmas(members, weights)
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
        if some and not results.capturing(plain[0]):
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
        last = self._last
        if last is not None and [r() for r in last.members] == members:
            return last.sigmas
        found = [m.known.sigma for m in members]
        return [torch.stack([found[i] for i in indices]) for indices in groups_of(weights)]
