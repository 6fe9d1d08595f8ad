"""spectral_norm as grouped autograd Functions: one node for all layers of a group.

Normalised weights are shared by the forwards and the `.backward()` calls of one optimizer step, so the Functions keep
plain references instead of saved tensors, which a first backward would free, and look themselves for changes in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gpkernels import registry
from gpkernels._support import under_transform, under_vmap
from gpkernels.ops.spectral_norm import reference
from gpkernels.ops.spectral_norm.layout import Layout, layouts, pack, unpack

Sigmas = list[Tensor]
"""sigma of every layer, a tensor (L,) for each device and dtype: see `groups_of`."""


_T = TypeVar("_T")


def _take(values: Sequence[_T], indices: list[int]) -> list[_T]:
    return list(values) if len(indices) == len(values) else [values[i] for i in indices]


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """The reference multiplies matrices, which autocast would round."""
    kind = x.device.type  # torch.autocast knows no meta device
    on = not x.is_meta and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else contextlib.nullcontext()


def groups_of(weights: Sequence[Tensor]) -> list[list[int]]:
    """Indices of the weights that one call of a kernel takes: one device and dtype each, in order of appearance."""
    if not weights:
        return []
    first = weights[0]
    if all(w.dtype == first.dtype and w.device == first.device for w in weights):
        return [list(range(len(weights)))]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, w in enumerate(weights):
        groups.setdefault((w.device, w.dtype), []).append(i)
    return list(groups.values())


def by_layer(weights: Sequence[Tensor], sigmas: Sigmas) -> list[Tensor]:
    """sigma of each weight, as views of shape ()."""
    result: list[Tensor] = [sigmas[0]] * len(weights)
    for indices, sigma in zip(groups_of(weights), sigmas, strict=True):
        for i, s in zip(indices, sigma.unbind(), strict=True):
            result[i] = s
    return result


def spectral_iterate(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    iterations: int,
    eps: float,
) -> Sigmas:
    """Moves every u and v in place by so many power iterations and returns sigma. Not differentiable.

    Args:
        weights: any shapes, memory formats, devices and floating dtypes, none without elements.
        u, v: of shape (rows,) and (cols,), contiguous, in the accumulation dtype, on the weight's device.
        dims: which dimension of each weight is rows, >= 0.
        iterations: 0 only computes sigma = u . (W v).
    """
    sigmas = []
    for indices in groups_of(weights):
        w, left, right = (_take(x, indices) for x in (weights, u, v))
        impl = registry.choose("spectral_norm", w[0])
        sigmas.append(_moved(impl.iterate, w, left, right, _take(dims, indices), iterations, eps)[0])
    return sigmas


class Updated(NamedTuple):
    """What `spectral_update` leaves of layers of one device and dtype, laid out for the kernels."""

    indices: list[int]
    """Of the layers, among all."""
    sigma: Tensor
    vectors: Tensor
    results: list[Tensor]
    dims: list[int]
    forms: list[Layout] | None

    def normalised(self) -> list[Tensor]:
        return _restored(self.forms, self.results)


def spectral_update(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    dims: Sequence[int],
    targets: Sequence[float],
    iterations: int,
    eps: float,
) -> list[Updated]:
    """`spectral_iterate`, and the weights that `spectral_scale` would return, without a graph: `spectral_attach` gives
    them one."""
    updates = []
    for indices in groups_of(weights):
        w, left, right = (_take(x, indices) for x in (weights, u, v))
        impl = registry.choose("spectral_norm", w[0])
        d, t = _take(dims, indices), _take(targets, indices)
        result, d, forms = _moved(impl.update, w, left, right, d, t, iterations, eps)
        sigma, vectors, results = result
        updates.append(Updated(indices, sigma, vectors, results, d, forms))
    return updates


def spectral_attach(updated: Updated, weights: Sequence[Tensor], targets: Sequence[float], eps: float) -> list[Tensor]:
    """What an update normalised, as functions of those of its weights that require grad."""
    w, t = _take(weights, updated.indices), _take(targets, updated.indices)
    impl = registry.choose("spectral_norm", w[0])
    options = Options(updated.vectors, updated.sigma, updated.dims, t, eps, impl)
    return _restored(updated.forms, Scale.apply(options, updated.results, *_arranged(updated.forms, w)))


def spectral_scale(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Sigmas,
    dims: Sequence[int],
    targets: Sequence[float],
    eps: float,
) -> list[Tensor]:
    """target W / sigma of every weight (target W where sigma <= eps), in its dtype and memory format.

    `sigma` is what `spectral_iterate` returned for these weights, u and v; in the gradient it is u . (W v), with u and
    v, of which it keeps copies, as constants. It must stay as it is until the last backward, and so must the weights:
    else it raises RuntimeError. Highest gradient order: any, in the weights.
    """
    result: list[Tensor] = list(weights)
    for indices, s in zip(groups_of(weights), sigma, strict=True):
        w, left, right = (_take(x, indices) for x in (weights, u, v))
        d, t = _take(dims, indices), _take(targets, indices)
        if under_transform():
            with without_autocast(w[0]):
                scaled: Sequence[Tensor] = [_plain(*layer, eps) for layer in zip(w, left, right, d, t, strict=True)]
        else:
            forms, impl = layouts(w, d), registry.choose("spectral_norm", w[0])
            arranged = _arranged(forms, w)
            if torch.is_grad_enabled() and any(x.requires_grad for x in w):
                moved, kernel_dims = _arranged_v(forms, right), _kernel_dims(forms, d)
                scaled = Scale.apply(Options(pack(left, moved), s, kernel_dims, t, eps, impl), None, *arranged)
            else:
                scaled = impl.forward([x.detach() for x in arranged], s, t, eps)
            scaled = _restored(forms, scaled)
        for i, out in zip(indices, scaled, strict=True):
            result[i] = out
    return result


def _arranged(forms: list[Layout] | None, weights: Sequence[Tensor]) -> list[Tensor]:
    if forms is None:
        return list(weights)
    return [form.arrange(w).contiguous() for form, w in zip(forms, weights, strict=True)]


def _arranged_v(forms: list[Layout] | None, v: Sequence[Tensor]) -> list[Tensor]:
    return list(v) if forms is None else [form.arrange_v(x) for form, x in zip(forms, v, strict=True)]


def _kernel_dims(forms: list[Layout] | None, dims: Sequence[int]) -> list[int]:
    return list(dims) if forms is None else [form.kernel_dim for form in forms]


def _restored(forms: list[Layout] | None, results: Sequence[Tensor]) -> list[Tensor]:
    return list(results) if forms is None else [form.restore(x) for form, x in zip(forms, results, strict=True)]


def _moved(
    f: Any, weights: list[Tensor], u: list[Tensor], v: list[Tensor], dims: list[int], *rest: Any
) -> tuple[Any, list[int], list[Layout] | None]:
    """The result of an op that moves u and v, `rest` being its arguments after dims, with eps last and the iterations
    before; and the dims and layouts that it was given the weights in."""
    forms = layouts(weights, dims)
    moved, dims = _arranged_v(forms, v), _kernel_dims(forms, dims)
    with torch.no_grad(), without_autocast(weights[0]):
        result = f(_arranged(forms, weights), u, moved, dims, *rest)
        if rest[-2]:
            for form, own, x in zip(forms or (), v, moved, strict=forms is not None):
                if x is not own:
                    own.copy_(form.restore_v(x))
            if not torch.compiler.is_compiling():
                written = (*u, *(own for own, x in zip(v, moved, strict=True) if x is own))
                torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])
    return result, dims, forms


def _plain(weight: Tensor, u: Tensor, v: Tensor, dim: int, target: float, eps: float) -> Tensor:
    """A layer in plain torch, which sees sigma as a function of the weight."""
    sigma = reference.sigma(weight, u, v, dim)
    return reference.spectral_norm_scale([weight], sigma.unsqueeze(0), [target], eps)[0]


class Options(NamedTuple):
    """The constants of a call, one device and dtype; vectors and dims of weights that are contiguous."""

    vectors: Tensor
    sigma: Tensor
    dims: list[int]
    targets: list[float]
    eps: float
    impl: registry.Implementation

    def of(self, layers: list[int], weights: Sequence[Tensor]) -> Options:
        """Those of some layers."""
        if len(layers) == len(self.dims):
            return self
        u, v = unpack(self.vectors, weights, self.dims)
        dims, targets = _take(self.dims, layers), _take(self.targets, layers)
        sigma = torch.stack(_take(self.sigma.unbind(), layers))  # an index would wait for the GPU
        return self._replace(vectors=pack(_take(u, layers), _take(v, layers)), sigma=sigma, dims=dims, targets=targets)


def _remember(ctx: Any, options: Options, weights: tuple[Tensor, ...]) -> None:
    ctx.options, ctx.weights = options, weights
    if not torch.compiler.is_compiling():
        ctx.versions = _versions(ctx)


def _versions(ctx: Any) -> list[int]:
    tensors = (*ctx.weights, ctx.options.sigma)
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # inference tensors have none
        return [0 if t.is_inference() else t._version for t in tensors]


def _check_versions(ctx: Any, used: list[int]) -> None:
    """Raises if a tensor that these layers' gradients need has changed; the others of the group may have."""
    if torch.compiler.is_compiling():
        return
    now, layers = _versions(ctx), len(ctx.weights)
    if now == ctx.versions:
        return
    changed = [i for i, (a, b) in enumerate(zip(now, ctx.versions, strict=True)) if a != b]
    first = next((i for i in changed if i == layers or i in used), None)
    if first is None:
        return
    what = "sigma"
    if first < layers:
        what = f"the weight of layer {first}, of shape {tuple(ctx.weights[first].shape)},"
    raise RuntimeError(
        f"spectral_norm: {what} was changed in place since it was used, and the gradient needs its old value: "
        "run every backward before the optimizer step that changes it"
    )


class Scale(torch.autograd.Function):
    """target W / sigma of all layers: `results`, if an update has them. Highest gradient order: any, in the weights."""

    @staticmethod
    def forward(ctx: Any, options: Options, results: list[Tensor] | None, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        _remember(ctx, options, weights)
        if results is None:
            results = options.impl.forward(list(weights), options.sigma, options.targets, options.eps)
        constant = [x for x, needed in zip(results, ctx.needs_input_grad[2:], strict=True) if not needed]
        if constant:
            ctx.mark_non_differentiable(*constant)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        layers = [i for i, g in enumerate(grads) if g is not None and needed[i]]
        _check_versions(ctx, layers)
        results: list[Tensor | None] = [None] * (len(grads) + 2)
        if layers:
            some = [_dense(grads[i]) for i in layers]
            weights, options = [ctx.weights[i] for i in layers], ctx.options.of(layers, ctx.weights)
            if under_vmap(*some):
                in_weights: Sequence[Tensor] = _plain_backward(options, some, weights)
            elif torch.is_grad_enabled():
                in_weights = ScaleBackward.apply(options, *some, *weights)
            else:
                in_weights = _backward(options, some, weights)
            for i, grad in zip(layers, in_weights, strict=True):
                results[i + 2] = grad
        return tuple(results)


def _dense(grad: Any) -> Tensor:
    """Embeddings with sparse=True send sparse gradients; that of a norm is dense."""
    return grad if torch.compiler.is_compiling() or grad.layout is torch.strided else grad.to_dense()


def _backward(options: Options, grads: list[Any], weights: list[Tensor]) -> list[Tensor]:
    vectors, sigma, dims, targets, eps, impl = options
    return impl.backward([g.contiguous() for g in grads], weights, vectors, sigma, dims, targets, eps)


def _plain_backward(options: Options, grads: list[Any], weights: list[Tensor]) -> list[Tensor]:
    """In plain torch, differentiable."""
    vectors, _, dims, targets, eps, _ = options
    u, v = unpack(vectors, weights, dims)
    with without_autocast(weights[0]):
        sigma = torch.stack([reference.sigma(*layer) for layer in zip(weights, u, v, dims, strict=True)])
        return reference.spectral_norm_scale_backward(grads, weights, vectors, sigma, dims, targets, eps)


class ScaleBackward(torch.autograd.Function):
    """The gradient in the weights of the given layers. Highest gradient order: any, in gradients and weights; its own
    derivatives are the reference's, in plain torch."""

    @staticmethod
    def forward(ctx: Any, options: Options, *grads_and_weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        layers = len(options.dims)
        ctx.grads = grads_and_weights[:layers]
        _remember(ctx, options, grads_and_weights[layers:])
        return tuple(_backward(options, list(ctx.grads), list(ctx.weights)))

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _check_versions(ctx, [i for i, t in enumerate(tangents) if t is not None])
        vectors, sigma, dims, targets, eps, _ = ctx.options
        u, v = unpack(vectors, ctx.weights, dims)
        dead, layers = (sigma <= eps).unbind(), len(dims)
        results: list[Tensor | None] = [None] * (1 + 2 * layers)
        with without_autocast(sigma):
            for i, tangent in enumerate(tangents):
                if tangent is not None:
                    results[1 + i], results[1 + layers + i] = reference.spectral_norm_scale_double_backward(
                        tangent, ctx.grads[i], ctx.weights[i], u[i], v[i], dead[i], dims[i], targets[i]
                    )
        needed = ctx.needs_input_grad
        return tuple(r if need else None for r, need in zip(results, needed, strict=True))
