"""The layers that are normalised together: one call for all, shared by the forwards of a step."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.spectral_norm.autograd import Sigmas, by_layer, groups_of, spectral_iterate, spectral_scale
from gpkernels.spectral import steps
from gpkernels.spectral.layout import layout
from gpkernels.spectral.portable import State

if TYPE_CHECKING:
    from gpkernels.spectral.parametrization import SpectralNorm


class Result(NamedTuple):
    """A normalised weight kept for the next read, and the state it was made in."""

    value: Tensor
    version: int
    state: State
    captured: bool
    once: bool

    def holds(self, state: State) -> bool:
        value = self.value
        if self.state != state or self.captured != _capturing(value):
            return False
        if value.is_inference():
            return torch.is_inference_mode_enabled()
        return value._version == self.version


class Group:
    """Layers with the same `iterations` and `eps`. It holds them weakly; copied or unpickled, a group starts anew with
    the layers that were copied with it."""

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

    def watched(self) -> Iterator[tuple[SpectralNorm, Tensor]]:
        """The layers that are in use, each with its weight."""
        for reference in tuple(self._members):
            member = reference()
            weight = None if member is None else member.original()
            if member is not None and weight is not None:
                yield member, weight

    @torch.no_grad()
    def update(self, members: Sequence[SpectralNorm], iterations: int | None = None) -> None:
        """Moves u and v of these layers, and keeps their sigma. iterations=0 only measures it."""
        with self._lock, _without_autocast(members[0]):
            originals, forms, weights, u, v = [], [], [], [], []
            for member in members:
                weight = member.original()
                assert weight is not None
                member.fit(weight)
                form = layout(weight, member.dim)
                own_u, own_v = member.uv()
                originals.append(weight)
                forms.append(form)
                weights.append(form.arrange(weight.detach()))
                u.append(own_u)
                v.append(form.arrange_v(own_v))
            iterations = self.iterations if iterations is None else iterations
            sigmas = spectral_iterate(weights, u, v, [form.kernel_dim for form in forms], iterations, self.eps)
            now = steps.tick()
            for i, sigma in enumerate(by_layer(weights, sigmas)):
                own_v = members[i].uv()[1]
                if v[i] is not own_v and iterations:
                    own_v.copy_(forms[i].restore_v(v[i]))
                known = members[i].known
                if self._graph_reads_sigma and known.sigma is not None and known.sigma.device == sigma.device:
                    known.sigma.copy_(sigma)  # where the graph will look for it
                else:
                    known.sigma = sigma
                known.results.clear()
                known.at, known.state = now, members[i].state(originals[i])
                known.mark = known.state[0]
            self._last = None if self._graph_reads_sigma else ([weakref.ref(m) for m in members], sigmas)

    def read(self, member: SpectralNorm, weight: Tensor) -> Tensor:
        """The normalised weight of a layer, computed with those of all layers that the same pass will ask for."""
        if weight is not member.original():
            return self._compute([member], [weight], False)[0]
        with self._lock:
            grads, state = torch.is_grad_enabled() and weight.requires_grad, member.state(weight)
            if None in state:
                return self._compute([member], [weight], False)[0]
            found = member.take(grads, state)
            if found is not None:
                return found
            known = member.known.state == state
            batch = [
                (m, w, s)
                for m, w in self.watched()
                if (torch.is_grad_enabled() and w.requires_grad) == grads
                and None not in (s := m.state(w))
                and (m.known.state == s) == known
                and (m is member or not m.has(grads, s))
            ]
            captured = _capturing(weight)
            self._graph_reads_sigma |= captured
            results = self._compute([m for m, _, _ in batch], [w for _, w, _ in batch], known)
            for (m, _, s), value in zip(batch, results, strict=True):
                version = 0 if value.is_inference() else value._version
                once = self._graph_reads_sigma or not (known or (grads and m.training))
                m.known.results[grads] = Result(value, version, s, captured, once)
            mine = member.take(grads, state)
            assert mine is not None
            return mine

    def _compute(self, members: list[SpectralNorm], weights: list[Tensor], known: bool) -> list[Tensor]:
        """W target / sigma; `known` where the layers' sigma belongs to their state."""
        grads = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        with _without_autocast(members[0]):
            forms = [layout(w, m.dim) for m, w in zip(members, weights, strict=True)]
            dims = [form.kernel_dim for form in forms]
            arranged = [form.arrange(w) for form, w in zip(forms, weights, strict=True)]
            u, v = map(list, zip(*(m.uv() for m in members), strict=True))
            with torch.no_grad():
                if not known:
                    u, v = (
                        units([x.to(accumulation_dtype(w.dtype)) for x, w in zip(vectors, weights, strict=True)])
                        for vectors in (u, v)
                    )
                elif grads:  # the backward's own: DDP may write the buffers before it, with the same values
                    both = copies([*u, *v])
                    u, v = both[: len(u)], both[len(u) :]
                v = [form.arrange_v(x) for form, x in zip(forms, v, strict=True)]
                if known:
                    sigmas = self._known_sigmas(members, weights)
                else:
                    sigmas = spectral_iterate([w.detach() for w in arranged], u, v, dims, 0, self.eps)
            targets = [m.target for m in members]
            scaled = spectral_scale(arranged, u, v, sigmas, dims, targets, self.eps)
            return [form.restore(x) for form, x in zip(forms, scaled, strict=True)]

    def _known_sigmas(self, members: list[SpectralNorm], weights: list[Tensor]) -> Sigmas:
        if self._last is not None:
            last, sigmas = self._last
            if len(last) == len(members) and all(r() is m for r, m in zip(last, members, strict=True)):
                return sigmas
        found = [m.known.sigma for m in members]
        return [torch.stack([s for i in indices if (s := found[i]) is not None]) for indices in groups_of(weights)]


def units(vectors: list[Tensor]) -> list[Tensor]:
    """The vectors at length 1, to the bit as they are where they have it already; a zero vector stays. New tensors."""
    lengths = torch._foreach_norm(vectors)
    factors = [torch.where(((n - 1).abs() < 1e-5) | (n == 0), 1.0, n) for n in lengths]
    return list(torch._foreach_div(vectors, factors))


def copies(vectors: list[Tensor]) -> list[Tensor]:
    """Copies, made in one call."""
    first = vectors[0]
    if first.is_cuda or any(x.dtype != first.dtype or x.device != first.device for x in vectors):
        return list(torch._foreach_mul(vectors, 1.0))  # aligned each, as the kernels like them
    return list(torch.cat(vectors).split([len(x) for x in vectors]))


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _without_autocast(member: SpectralNorm) -> Any:
    """The norm is computed in the weight's own dtype: under autocast the reference's products would not be."""
    return torch.autocast(member.uv()[0].device.type, enabled=False)
