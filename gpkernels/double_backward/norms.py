"""Normalisation with the statistics of a batch, sample or group, and the (leaky) ReLU after it.

    Norm            y  = gamma xh + beta          to x, gamma, beta: NormBackward(g)
    NormActivation  z  = act(y), same x           to x, gamma, beta: NormBackward(g), of both at once
    NormBackward    the three gradients           to g, x, gamma: the closed form of `gpkernels.ops.norm_act`

The forwards are torch's own kernels. An activation whose input is the very result of a Norm becomes a NormActivation
on that norm's x; the Norm's own node is left without a gradient to pass on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkernels import registry
from gpkernels._support import under_vmap
from gpkernels.double_backward._nodes import (
    Node,
    Recording,
    autocast_float32,
    autocast_unknown,
    reroutable,
    wants,
)
from gpkernels.ops._layout import accumulation_dtype, layout_of
from gpkernels.ops.norm_act import reference

Forward = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Statistics:
    """Which elements share a mean: `groups` as in `gpkernels.ops.norm_act`, after the view that makes LayerNorm's
    trailing dimensions its channels, `channels` many."""

    groups: int
    eps: float
    channels: int | None = None

    def view(self, x: Tensor) -> Tensor:
        return x if self.channels is None else x.reshape(-1, self.channels)

    def dense(self, x: Tensor, *tensors: Tensor | None) -> list[Any]:
        """The tensors, of the shape of x, as the kernels take them: viewed, and all in the layout of x."""
        if self.channels is None:
            layout = layout_of(x)
            return [None if t is None else t.contiguous(memory_format=layout) for t in tensors]
        return [None if t is None else t.contiguous().view(-1, self.channels) for t in tensors]


def _affine(value: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight as the kernels take it: flat and contiguous, in the accumulation dtype."""
    return None if value is None else value.reshape(-1).to(accumulation_dtype(x.dtype)).contiguous()


class Norm(Node):
    """forward(x, weight, bias) -> (y, mean, rstd), the last two without gradient. Highest gradient order: any."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, forward: Forward, statistics: Statistics
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, mean, rstd = forward(x, weight, bias)
        dtype = accumulation_dtype(x.dtype)
        mean, rstd = (s.to(dtype).reshape((-1, statistics.groups) if statistics.groups else -1) for s in (mean, rstd))
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, None, mean, rstd)
        ctx.bias, ctx.statistics, ctx.slope, ctx.first = bias, statistics, 0.0, 0
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *unused: None) -> tuple[Any, ...]:
        return (*_backward(ctx, g, ctx.saved_tensors), None, None) if g is not None else (None,) * 5


class NormActivation(Node):
    """act(y), for y the result of a Norm of x. Highest gradient order: any, in x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        statistics: Statistics,
        slope: float,
        act: Any,
        in_place: bool,
        recording: Recording,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        z = act.apply(y, in_place=in_place)
        if in_place:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, weight, z, mean, rstd)
        ctx.rescued, ctx.may_change = None, not (in_place or act.torch_keeps_result)
        ctx.bias, ctx.statistics, ctx.slope, ctx.first = bias, statistics, slope, 1
        ctx.act, ctx.recording, ctx.apart = act, recording, False
        ctx.result = None if in_place else weakref.ref(y)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Any, ...]:
        """Through y where somebody can have asked for its gradient, or hooked it; else past it."""
        if g is None:
            return (None,) * 11
        saved = ctx.saved_tensors if ctx.rescued is None else ctx.rescued.unchanged()
        if ctx.apart or ctx.recording.hooked or (ctx.result is not None and ctx.result() is not None):
            return ctx.act.gradient(g, saved[2]), *(None,) * 10
        return None, *_backward(ctx, g, saved), *(None,) * 7

    @staticmethod
    def rescue(node: Any, z: Tensor) -> None:
        x, weight, _, mean, rstd = node.saved_tensors
        node.rescued = _Rescued((x, weight, z, mean, rstd), _versions(x, weight))


@dataclass(frozen=True)
class _Rescued:
    """Saved tensors in the care of a node, since autograd would complain of the one among them that has changed."""

    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]  # of x and weight

    def unchanged(self) -> tuple[Tensor | None, ...]:
        if _versions(*self.tensors[:2]) != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                "the input or the weight of a norm"
            )
        return self.tensors


def _backward(ctx: Any, g: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in x, weight and bias, which are the Function's arguments from slot `ctx.first` on."""
    x, weight, z, mean, rstd = saved
    first, bias = ctx.first, ctx.bias
    needs = (wants(ctx, first), wants(ctx, first + 1), wants(ctx, first + 2, edge=first + 1 + (weight is not None)))
    z = None if z is None else z.detach()
    if under_vmap(g):
        grads = _by_reference(ctx.statistics, g, x, weight, z, ctx.slope)
    else:
        grads = NormBackward.apply(g, x, weight, bias, z, mean, rstd, ctx.statistics, ctx.slope, needs)
    in_x, in_weight, in_bias = grads
    return (
        in_x if needs[0] else None,
        in_weight.to(weight.dtype).reshape(weight.shape) if needs[1] else None,
        in_bias.to(bias.dtype).reshape(bias.shape) if needs[2] else None,
    )


class NormBackward(Node):
    """norm_act_backward: gradients in x, weight and bias. Highest gradient order: any, in g, x and weight.

    bias is an argument so that its gradient is zeros, as autograd's own would be, instead of None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        z: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        statistics: Statistics,
        slope: float,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight, z, mean, rstd)
        ctx.bias, ctx.statistics, ctx.slope = bias, statistics, slope
        ctx.impl = registry.choose("norm_act", x)
        grad_x, grad_weight, grad_bias = ctx.impl.backward(
            *statistics.dense(x, g, x, z), mean, rstd, _affine(weight, x), statistics.groups, slope, any(needs[1:])
        )
        return grad_x.view(x.shape) if statistics.channels else grad_x, grad_weight, grad_bias

    @staticmethod
    def backward(
        ctx: Any, tangent: Tensor | None, tangent_weight: Tensor | None, tangent_bias: Tensor | None
    ) -> tuple[Any, ...]:
        nothing = (None,) * 6
        if tangent is None and tangent_weight is None and tangent_bias is None:
            return (None,) * 10
        g, x, weight, z, mean, rstd = ctx.saved_tensors
        in_bias = torch.zeros_like(ctx.bias) if wants(ctx, 3, edge=2 + (weight is not None)) else None
        if tangent is None or tangent_weight is not None or tangent_bias is not None or torch.is_grad_enabled():
            return *_general(ctx, tangent, tangent_weight, tangent_bias), in_bias, *nothing
        statistics = ctx.statistics
        in_g, in_x, in_weight = ctx.impl.double_backward(
            *statistics.dense(x, tangent, g, x, z), mean, rstd, _affine(weight, x), statistics.groups, ctx.slope
        )
        return (
            in_g.view(x.shape) if wants(ctx, 0) else None,
            in_x.view(x.shape) if wants(ctx, 1) else None,
            in_weight.to(weight.dtype).reshape(weight.shape) if weight is not None and wants(ctx, 2) else None,
            in_bias,
            *nothing,
        )


def _by_reference(
    statistics: Statistics, g: Any, x: Any, weight: Tensor | None, z: Tensor | None, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients in plain operations, which can be differentiated in g, x and weight."""
    view, groups = statistics.view, statistics.groups
    mean, rstd = reference.statistics(view(x), groups, statistics.eps)
    flat = None if weight is None else weight.reshape(-1).to(accumulation_dtype(x.dtype))
    in_x, in_weight, in_bias = reference.norm_act_backward(
        view(g), view(x), None if z is None else view(z), mean, rstd, flat, groups, slope, True
    )
    return in_x.reshape(x.shape), in_weight, in_bias


def _general(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivative in g, x and weight by the differentiable reference, along tangents of all three gradients."""
    g, x, weight, z, _, _ = ctx.saved_tensors
    statistics, create_graph = ctx.statistics, torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [None if t is None else t.view_as(t) for t in (g, x, weight)]
        inputs = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in inputs]
        g2, x2, w2 = inputs
        grads = _by_reference(statistics, g2, x2, w2, z, ctx.slope)
        pairs = [
            (grad, tangent.reshape(grad.shape))
            for grad, tangent in zip(grads, tangents, strict=True)
            if tangent is not None
        ]
    wanted = [t for i, t in enumerate(inputs) if t is not None and wants(ctx, i)]
    found = iter(
        torch.autograd.grad(
            [grad for grad, _ in pairs],
            wanted,
            [tangent for _, tangent in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        if wanted
        else ()
    )
    return tuple(next(found) if t is not None and wants(ctx, i) else None for i, t in enumerate(inputs))


@dataclass(frozen=True)
class _Source:
    """What a norm's result was made from."""

    result: weakref.ref[Tensor]
    versions: tuple[int, ...]  # of y, x and weight
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    statistics: Statistics


def _apply(
    recording: Recording,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    forward: Forward,
    statistics: Statistics,
) -> Tensor:
    y, mean, rstd = Norm.apply(x, weight, bias, forward, statistics)
    source = _Source(weakref.ref(y), _versions(y, x, weight), x, weight, bias, mean, rstd, statistics)
    recording.norms[id(y)] = source
    return y


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t._version for t in tensors)


def activated(recording: Recording, y: Tensor, act: Any, in_place: bool) -> Tensor | None:
    """The activation of y fused with the norm whose result y is; None where y is something else, or x, y or the weight
    have changed or got a hook since."""
    s = recording.norms.get(id(y))
    if s is None or s.result() is not y or y._backward_hooks or s.versions != _versions(y, s.x, s.weight):
        return None
    inputs = (y, s.x, s.weight, s.bias, s.mean, s.rstd)
    z = NormActivation.apply(*inputs, s.statistics, act.slope, act, in_place, recording)
    if not in_place:
        recording.fused.append((s.result, z.grad_fn))
    return z


def batch_norm(
    recording: Recording,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """The row of batch_norm. In evaluation it is an affine map, of plain torch. SyncBatchNorm does not call it."""
    if not reroutable(input, weight, bias) or input.dim() < 2:
        return NotImplemented
    if any(t is not None and t.shape != (input.shape[1],) for t in (weight, bias, running_mean, running_var)):
        return NotImplemented
    if not training:
        return _affine_norm(_dense(input), running_mean, running_var, weight, bias, eps)
    if input.numel() <= input.shape[1]:
        return NotImplemented

    def forward(x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, w, b, running_mean, running_var, True, momentum, eps)

    return _apply(recording, _dense(input), weight, bias, forward, Statistics(0, eps))


def _affine_norm(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    if mean is None or var is None or mean.requires_grad or var.requires_grad:
        return NotImplemented
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = weight * scale
    shape = (1, -1, *[1] * (x.dim() - 2))
    centred, scale = x - mean.view(shape), scale.view(shape)
    y = centred * scale if bias is None else torch.addcmul(bias.view(shape), centred, scale)
    return y.to(x.dtype)


def instance_norm(
    recording: Recording,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """The row of instance_norm, without running statistics."""
    plain = running_mean is not None or running_var is not None or not use_input_stats
    if plain or not reroutable(input, weight, bias) or input.dim() < 3 or input.shape[2:].numel() <= 1:
        return NotImplemented
    return _group_norm(recording, input.contiguous(), weight, bias, input.shape[1], eps)


def group_norm(
    recording: Recording,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """The row of group_norm."""
    if not reroutable(input, weight, bias) or input.dim() < 2 or num_groups < 1 or input.shape[1] % num_groups:
        return NotImplemented
    if input.numel() == input.shape[0] * num_groups:
        return NotImplemented
    x, w, b = autocast_float32(input, weight, bias)
    return _group_norm(recording, x, w, b, num_groups, eps)


def _group_norm(
    recording: Recording, x: Any, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Any:
    """torch's CUDA kernel, which InstanceNorm does not use, wants one dtype."""
    if autocast_unknown(x) or (x.is_cuda and any(t is not None and t.dtype != x.dtype for t in (weight, bias))):
        return NotImplemented
    batch, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()

    def forward(x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = torch.native_group_norm(x, w, b, batch, channels, pixels, groups, eps)
        return y.contiguous(memory_format=layout_of(x)), mean, rstd

    return _apply(recording, _dense(x), weight, bias, forward, Statistics(groups, eps))


def layer_norm(
    recording: Recording,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """The row of layer_norm."""
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if not reroutable(input, weight, bias) or list(input.shape[-len(shape) :]) != shape:
        return NotImplemented
    if autocast_unknown(input):
        return NotImplemented
    x: Any
    x, weight, bias = autocast_float32(input, weight, bias)

    def forward(x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, shape, w, b, eps)

    return _apply(recording, x, weight, bias, forward, Statistics(1, eps, input.shape[-len(shape) :].numel()))


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=layout_of(x))
