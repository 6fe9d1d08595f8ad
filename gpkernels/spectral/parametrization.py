"""The parametrization W -> target W / sigma(W)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from gpkernels._support import under_transform
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.spectral_norm import reference
from gpkernels.ops.spectral_norm.autograd import spectral_iterate, spectral_scale, without_autocast
from gpkernels.spectral import results, steps
from gpkernels.spectral.group import Group
from gpkernels.spectral.portable import Owned, State
from gpkernels.spectral.vectors import START, fresh, start, units


class SpectralNorm(Owned):
    """target W / sigma(W) of a weight with at least two dimensions, W being (shape[dim], the others).

    Buffers, named as in torch: `_u` (rows,) and `_v` (cols,), float32 (float64 for a float64 weight) whatever the
    weight's dtype. A layer whose sigma is at most eps is left as target W.

    It is grouped with others by `group` (update="step"), or iterates at every read in training mode (update="read",
    group None), in torch's order: u first. Highest gradient order: any, in W.
    """

    vectors = ("_u", "_v")
    _u: Tensor
    _v: Tensor

    def __init__(
        self, weight: Tensor, dim: int, *, iterations: int, eps: float, target: float, init: str, group: Group | None
    ) -> None:
        super().__init__()
        self.dim, self.iterations, self.eps, self.target, self.init = dim, iterations, eps, target, init
        self.group, self.at_reads = group, group is None
        with torch.no_grad():
            if group is None:  # torch's random numbers
                sizes = weight.shape[dim], weight.numel() // weight.shape[dim]
                like = weight.detach().new_empty(0, dtype=accumulation_dtype(weight.dtype))
                u, v = (nn.functional.normalize(like.new_empty(n).normal_(), dim=0, eps=eps) for n in sizes)
            else:
                u, v = start(weight, dim)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)
            if weight.is_meta:
                return
            if group is None and init == "power":
                self._iterate(reference.matrix(weight.detach(), dim), START)
            else:
                self.restart(weight.detach())

    def attach(self, owner: ParametrizationList) -> None:
        """A first parametrization joins the group's common reads; one after others is computed by itself."""
        super().attach(owner)
        if self.group is not None:
            self.group.add(self)

    @torch.no_grad()
    def restart(self, weight: Tensor) -> None:
        with without_autocast(weight):
            self.fit(weight)
            if self.init == "svd":
                left, _, right = torch.linalg.svd(reference.matrix(weight, self.dim), full_matrices=False)
                u, v = left[:, 0], right[0]
            else:
                (u,), (v,) = fresh([weight], [self.dim], self.eps)
            self._u.copy_(u)
            self._v.copy_(v)

    def uv(self) -> tuple[Tensor, Tensor]:
        """u and v, faster than as attributes."""
        buffers: Any = self._buffers
        return buffers["_u"], buffers["_v"]

    def state(self, weight: Tensor, moved: int = 0) -> State | None:
        """As of every parametrization, in a third of the time."""
        u, v = self.uv()
        try:
            return (
                (id(weight), weight.data_ptr(), id(u), u.data_ptr(), id(v), v.data_ptr()),
                (weight._version, u._version + moved, v._version + moved),
            )
        except RuntimeError:
            return None

    def is_known(self, state: State | None) -> bool:
        """Whether an update measured sigma in this state, and another one will follow the next change."""
        known = self.known
        return self.training and known.update is not None and state is not None and known.state == state

    def is_last(self, weight: Tensor) -> bool:
        """Whether it is the weight of the last update, whatever has been written to u and v since."""
        known = self.known
        return self.training and known.update is not None and known.mark == steps.mark(weight)

    def take(self, grads: bool, state: State) -> Tensor | None:
        """A result that is right in this state; one with a graph serves a read without gradients too."""
        results = self.known.results
        for key in (True,) if grads else (False, True):
            result = results.get(key)
            if result is None or not (result.waits or self.training):
                continue
            value = result.right(state)
            if value is None:
                continue
            if result.waits:
                if not (grads and self.training):
                    results.pop(key, None)
                elif self.known.fresh or self.known.copied:
                    result.value = None
                else:
                    result.kept = True
            return value if key == grads else value.detach()
        return None

    def forward(self, weight: Tensor) -> Tensor:
        return self._traced(weight) if torch.compiler.is_compiling() else self.read(weight)

    def read(self, weight: Tensor) -> Tensor:
        if self._is_traced(weight):
            return self._traced(weight)
        if self.group is None:
            return self._read_as_torch(weight)
        known = self.known
        if known.update is not None and self.is_known(self.state(weight)) and not results.capturing(weight):
            value = known.update.read(known.index, torch.is_grad_enabled() and weight.requires_grad)
            if value is not None:
                return value
        return self.group.read(self, weight)

    def _is_traced(self, weight: Tensor) -> bool:
        plain = type(weight) in (Tensor, nn.Parameter)
        return not plain or weight.is_meta or under_transform() or torch._C._get_tracing_state() is not None

    def _traced(self, weight: Tensor) -> Tensor:
        """In plain torch, for compilers, transforms and subclasses of Tensor, which see through it."""
        with without_autocast(weight):
            if self.group is None and self.training:
                with torch.no_grad():
                    self._iterate(reference.matrix(weight.detach(), self.dim), self.iterations)
            dtype = accumulation_dtype(weight.dtype)
            with torch.no_grad():
                u, v = (units([x.to(dtype)])[0] for x in (self._u, self._v))
            sigma = reference.sigma(weight, u, v, self.dim).abs()
            return reference.spectral_norm_scale([weight], sigma.unsqueeze(0), [self.target], self.eps)[0]

    def _read_as_torch(self, weight: Tensor) -> Tensor:
        with without_autocast(weight):
            self.fit(weight)
            with torch.no_grad():
                w = weight.detach()
                if self.training:
                    sigma = self._iterate(reference.matrix(w, self.dim), self.iterations)
                    u, v = self._u, self._v
                else:
                    sigma = spectral_iterate([w], [self._u], [self._v], [self.dim], 0, self.eps)
                    u, v = torch.where(sigma[0] < 0, -self._u, self._u), self._v
                    sigma = [sigma[0].abs()]
            return spectral_scale([weight], [u], [v], sigma, [self.dim], [self.target], self.eps)[0]

    @torch.no_grad()
    def update(self, weight: Tensor, iterations: int | None = None) -> None:
        """Moves u and v for a weight, outside any group."""
        with without_autocast(weight):
            self.fit(weight)
            self._iterate(reference.matrix(weight, self.dim), self.iterations if iterations is None else iterations)

    def _iterate(self, w: Tensor, iterations: int) -> list[Tensor]:
        """In torch's order, u before v: the iteration of W^T, which is the matrix w with its columns as rows."""
        return spectral_iterate([w], [self._v], [self._u], [1], iterations, self.eps)

    def measure(self, weight: Tensor) -> Tensor:
        """sigma of a weight with these u and v."""
        with torch.no_grad(), without_autocast(weight):
            if self.group is not None and not weight.is_meta:
                return self.group.measured([self], [weight])[2][0][0]
            dtype = accumulation_dtype(weight.dtype)
            u, v = (units([x.to(dtype)]) for x in (self._u, self._v))
            return spectral_iterate([weight.detach()], u, v, [self.dim], 0, self.eps)[0][0].abs()

    def extra_repr(self) -> str:
        update = "read" if self.group is None else "step"
        return f"dim={self.dim}, n_power_iterations={self.iterations}, target={self.target:g}, update={update!r}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.group is not None:
            self.group.add(self)


class SpectralNormOfVector(nn.Module):
    """target w / ||w|| of a weight with one dimension, whose norm needs no iteration; target w where ||w|| <= eps."""

    def __init__(self, eps: float, target: float) -> None:
        super().__init__()
        self.eps, self.target = eps, target

    def _parts(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, its largest element, which keeps squares finite, and the norm of their quotient."""
        wide = weight.to(accumulation_dtype(weight.dtype))
        largest = wide.detach().abs().amax()
        largest = torch.where(largest > 0, largest, 1.0)
        squares = (wide / largest).square().sum()
        return wide, largest, torch.where(squares > 0, squares, 1.0).sqrt()

    def measure(self, weight: Tensor) -> Tensor:
        wide, largest, norm = self._parts(weight)
        return torch.where(wide.detach().any(), norm * largest, 0.0)

    def forward(self, weight: Tensor) -> Tensor:
        wide, largest, norm = self._parts(weight)
        dead = self.measure(weight.detach()) <= self.eps
        return torch.where(dead, self.target * wide, wide / largest * (self.target / norm)).to(weight.dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value
