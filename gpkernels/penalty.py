"""The whole penalty for an unmodified critic: sample x, differentiate the critic there, penalise the norm."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkernels import double_backward, microbatches
from gpkernels._checks import check_choice, check_count, check_floating, check_number, check_same, fail
from gpkernels.double_backward import Entry, Recording
from gpkernels.functional import check_norm_eps, grad_norm_penalty
from gpkernels.kinds import KINDS, Draw, Kind, check_draw, check_inputs
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.grad_penalty.penalties import PENALTIES
from gpkernels.ops.grad_penalty.reference import AXES, NORMS

Critic = Callable[..., Tensor]


@dataclass(frozen=True)
class Measure:
    """weight * R(norms of a gradient): what is done with the gradient once there is one."""

    weight: float
    form: str
    target: float
    norm: str
    axes: str
    norm_eps: float

    def __call__(self, grad: Tensor, reduction: str = "mean") -> Tensor:
        value = grad_norm_penalty(
            grad,
            form=self.form,
            target=self.target,
            norm=self.norm,
            axes=self.axes,
            reduction=reduction,
            norm_eps=self.norm_eps,
        )
        return self.weight * value


def make_measure(
    kind: Kind, weight: float, form: str | None, target: float, norm: str, axes: str, norm_eps: float
) -> Measure:
    """Checks the options; form=None takes the kind's usual form, with its factor."""
    weight = check_number("weight", weight, minimum=0)
    if form is None:
        form, weight = kind.form, weight * kind.factor
    check_choice("form", form, PENALTIES)
    check_choice("norm", norm, NORMS)
    check_choice("axes", axes, AXES)
    target, norm_eps = check_number("target", target, minimum=0), check_norm_eps(norm_eps, norm)
    return Measure(weight, form, target, norm, axes, norm_eps)


@double_backward.never_compiled
def gradient_penalty(
    critic: Critic,
    real: Tensor | None,
    fake: Tensor | None = None,
    *,
    kind: str = "coupled",
    weight: float = 10.0,
    form: str | None = None,
    target: float = 1.0,
    norm: str = "l2",
    axes: str = "sample",
    norm_eps: float = 0.0,
    noise: str | None = None,
    scale: float | None = None,
    eps: Tensor | None = None,
    per_element: bool = False,
    generator: torch.Generator | None = None,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    microbatch: int | None = None,
) -> Tensor:
    """A gradient penalty to add to a critic's loss: weight * E_x R(||grad_x critic(x)||).

    Args:
        critic: any callable on (x, *critic_args, **critic_kwargs): a module, a closure, a compiled module (its
            uncompiled original is run, since compiled code has no second derivative). Scores may have shape (B,),
            (B, 1), (B, 1, 1, 1), (B, C) or any shape that starts with B; they are summed per sample.
        real, fake: samples of shape (B, ...), any floating dtype. Both are detached: the penalty trains the critic
            alone. `fake` is needed by kinds "coupled" and "r2"; the others need `real`.
        kind: where x lies: "coupled" (WGAN-GP) | "local" (DRAGAN) | "r1" | "r2" | "ls_gan_pg"; see `gpkernels.kinds`.
        weight: a number >= 0.
        form, target, norm, axes, norm_eps: R, as in `grad_norm_penalty`. form=None takes the kind's usual one; for
            "r1" and "r2" that is the squared norm with the factor 1/2, which an explicit form does not get.
        noise, scale: kind "local" only: "uniform" noise, U[-1, 1) times `scale` (0.5 if None) standard deviations of
            `real`, which is the default; or "normal", N(0, 1) times `scale`, which then has to be given.
        eps: kind "coupled" only: interpolation weights of shape (B,); drawn if None.
        per_element: kind "coupled" only: draw a weight for each element, as some public code does, not one a sample.
        generator: the torch generator that keys the draw.
        critic_args, critic_kwargs: passed to the critic after x, for example labels.
        scaler: a `torch.amp.GradScaler`. The gradient in x is computed from scaled scores, so that it does not
            underflow in float16, and unscaled in float32. Scale the total loss as usual.
        microbatch: compute the penalty over this many samples at a time, keeping one microbatch's graph in memory
            and the parameters' gradients instead. Same value and gradients; tensors among the critic's arguments
            whose first dimension is B are split alongside. Not for critics that mix samples.

    Returns:
        Tensor of shape (); float64 for float64 samples, else float32. Under `torch.no_grad` the value alone.
    Highest gradient order: as many as the critic supports, in its parameters; 1 with `microbatch`, then an error.
    Raises:
        TypeError, ValueError: arguments of another type, shape, dtype or device than stated, an empty batch,
            unknown names, arguments the kind needs and lacks or would ignore, scores of another batch size or
            device, or that do not depend on x.
    """
    row = _kind(kind)
    measure = make_measure(row, weight, form, target, norm, axes, norm_eps)
    draw = Draw(eps, per_element, noise, scale, generator)
    check_draw(row, draw)
    check_inputs(row, {"real": real, "fake": fake})
    for name, x in (("real", real), ("fake", fake)):
        if x is not None:
            check_floating(name, x)
    if real is not None and fake is not None:
        check_same("fake", fake, "real", real)
    call = _Call(critic, critic_args, critic_kwargs, scaler)
    with _recording():
        real, fake = (None if t is None else _detached(t) for t in (real, fake))
        x = row.point(real, fake, draw)
        value = _penalty(call, x, measure, microbatch, create_graph=call.create_graph)
    return value if call.create_graph else value.detach()


@double_backward.never_compiled
def score_and_penalty(
    critic: Critic,
    x: Tensor,
    *,
    kind: str = "r1",
    weight: float = 10.0,
    form: str | None = None,
    target: float = 1.0,
    norm: str = "l2",
    axes: str = "sample",
    norm_eps: float = 0.0,
    critic_args: Sequence[Any] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    microbatch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The critic's scores at x and the penalty at x, from one forward pass: `(scores, penalty)`.

    For the kinds that penalise at samples themselves: "r1" and "ls_gan_pg" at real ones, "r2" at fake ones. Both
    results carry gradients to the critic's parameters; x is detached. Arguments, shapes and errors are those of
    `gradient_penalty`. With `microbatch`, memory stays bounded at the price of the shared forward: the scores are
    computed a microbatch at a time under gradient checkpointing.
    """
    row = _kind(kind)
    if not row.at_samples:
        names = ", ".join(repr(k.name) for k in KINDS.values() if k.at_samples)
        raise fail("kind", f"one of {names}, which penalise at x itself", repr(kind))
    measure = make_measure(row, weight, form, target, norm, axes, norm_eps)
    check_floating("x", x)
    call = _Call(critic, critic_args, critic_kwargs, scaler)
    with _recording():
        x = _detached(x)
        if microbatch is not None:
            penalty = _penalty(call, x, measure, microbatch, create_graph=call.create_graph)
            scores = microbatches.checkpointed_scores(call, x, microbatch)
        else:
            trace = call.differentiate(x, call.create_graph)
            scores, penalty = trace.scores, measure(trace.grad)
            if call.create_graph:
                scores, penalty = double_backward.share(
                    scores, penalty, trace.entry, trace.recording, trace.scale, trace.views
                )
    return (scores, penalty) if call.create_graph else (scores.detach(), penalty.detach())


def _kind(name: str) -> Kind:
    check_choice("kind", name, KINDS)
    return KINDS[name]


def _recording() -> AbstractContextManager[Any]:
    """The gradient in x is needed even where the caller records nothing."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()


def _detached(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x.detach()


def _penalty(call: _Call, x: Tensor, measure: Measure, microbatch: int | None, *, create_graph: bool) -> Tensor:
    if microbatch is None:
        return measure(call.differentiate(x, create_graph).grad)
    check_count("microbatch", microbatch)
    if measure.axes == "batch":
        raise fail("microbatch", "None for axes='batch', whose norm spans the batch", microbatch)
    return microbatches.penalty(call, x, measure, microbatch, create_graph)


@dataclass(frozen=True)
class _Trace:
    """A critic's scores at x and their gradient in x, with the graph of both."""

    scores: Tensor
    grad: Tensor
    entry: Any  # the node of x, with which the graph ends
    recording: Recording
    scale: Tensor | None  # the factor that the gradient was computed with, and freed of
    views: list[Tensor]  # in which the graphs of the critic's arguments end


class _Constant(torch.autograd.Function):
    """grad, of a critic with no parameters to train: a value whose backward may be asked for, and gives nothing."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[None, None]:
        return None, None


class _Call:
    """A critic with its extra arguments, and the checks of what it returns."""

    def __init__(
        self,
        critic: Critic,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        if not callable(critic):
            raise TypeError(f"critic: wanted a callable, got {type(critic).__name__}")
        if not isinstance(args, (tuple, list)):
            raise TypeError(f"critic_args: wanted a tuple or list, got {type(args).__name__}")
        if not isinstance(kwargs, Mapping | None):
            raise TypeError(f"critic_kwargs: wanted a mapping, got {type(kwargs).__name__}")
        if not isinstance(scaler, torch.amp.GradScaler | None):
            raise TypeError(f"scaler: wanted a torch.amp.GradScaler, got {type(scaler).__name__}")
        self.critic = uncompiled(critic)
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self.scaler = scaler
        self.create_graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    def _on_views(self) -> tuple[_Call, list[Tensor]]:
        """This call on other tensors for the arguments that were computed from something, and the views of these that
        lie between: where the graph of a caller ends, and that of the critic begins."""
        views: list[Tensor] = []

        def within(argument: Any) -> Any:
            computed = isinstance(argument, Tensor) and argument.requires_grad and not argument.is_leaf
            if not computed or argument.layout is not torch.strided or argument.is_nested:
                return argument
            views.append(argument.view_as(argument))
            return views[-1].view_as(argument)

        call = copy.copy(self)
        call.args = tuple(within(a) for a in self.args)
        call.kwargs = {name: within(a) for name, a in self.kwargs.items()}
        return call, views

    def scores(self, x: Tensor) -> Tensor:
        scores = self.critic(x, *self.args, **self.kwargs)
        if not isinstance(scores, Tensor):
            raise TypeError(f"critic: wanted it to return a tensor of scores, got {type(scores).__name__}")
        if not scores.dtype.is_floating_point:
            raise TypeError(f"critic: wanted floating-point scores, got {scores.dtype}")
        if scores.dim() == 0 or scores.shape[0] != x.shape[0]:
            raise fail("critic", f"scores whose first dimension is the batch, {x.shape[0]}", tuple(scores.shape))
        if scores.device != x.device:
            raise fail("critic", f"scores on the device of x, {x.device}", scores.device)
        return scores

    def differentiate(self, x: Tensor, create_graph: bool) -> _Trace:
        """The scores at x and the gradient of each sample's in x; with create_graph both can be differentiated on."""
        x = Entry.apply(x.detach().requires_grad_())
        with double_backward.rerouted(create_graph, double_backward.pays(self.critic, x)) as recording:
            call, views = self._on_views()
            scores = call.scores(x)
        scale = self.loss_scale(scores.device)
        grad = self._input_gradient(scores, x, scale, create_graph)
        if create_graph and not grad.requires_grad:
            grad = _Constant.apply(grad, x)
        entry: Any = x.grad_fn
        entry.closed = True
        return _Trace(scores, grad, entry, recording, scale, views)

    def _input_gradient(self, scores: Tensor, x: Tensor, factor: Tensor | None, create_graph: bool) -> Tensor:
        if not scores.requires_grad:
            raise fail("critic", "scores that depend on x", "scores without a gradient (is x detached inside it?)")
        total = scores.sum()
        if factor is not None:
            total = total.float() * factor
        # retain_graph: the caller may go on to use the scores
        (grad,) = torch.autograd.grad(total, x, create_graph=create_graph, retain_graph=True, allow_unused=True)
        if grad is None:
            raise fail("critic", "scores that depend on x", "scores that do not (their gradient in x is None)")
        return grad if factor is None else grad.to(accumulation_dtype(grad.dtype)) / factor

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """The scaler's factor as a tensor, without waiting for the device; None where nothing is scaled."""
        if self.scaler is None or not self.scaler.is_enabled():
            return None
        factor = self.scaler.scale(torch.ones((), device=device))
        assert isinstance(factor, Tensor)
        return factor


def uncompiled(critic: Critic) -> Critic:
    """The original of a torch.compile'd critic, any other critic unchanged; with a warning, the first time, for a
    critic that is compiled or has a compiled module (which `double_backward` runs uncompiled)."""
    original = getattr(critic, "_orig_mod", None) or getattr(critic, "_torchdynamo_orig_callable", None)
    if original is not None or _has_compiled_module(critic):
        warnings.warn(
            "critic: a compiled critic has no second derivative, so the penalty runs its uncompiled original",
            stacklevel=_callers_level(),
        )
    return critic if original is None else original


def _has_compiled_module(critic: Critic) -> bool:
    if "torch._dynamo" not in sys.modules or not isinstance(critic, torch.nn.Module):
        return False
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in critic.modules())


def _callers_level() -> int:
    """The stack level, for the function that warns, of the first frame outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("gpkernels", "torch"):
        level, frame = level + 1, frame.f_back
    return level
