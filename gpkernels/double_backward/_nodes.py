"""What every autograd Function of this package shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules._functions import BackwardHookFunction

from gpkernels._support import under_vmap

_will_run = torch._C._will_engine_execute_node


class Recording:
    """What the nodes of one critic's forward have in common.

    `seeds`, of shape (B,), is set while `sharing` runs the backward of scores and penalty at once.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active  # calls are rerouted
        self.first = torch.autograd._get_sequence_nr()  # nodes of this thread's graphs with lower numbers are older
        self.seeds: Tensor | None = None
        self.weights_wanted = False  # every weight is an input of the running torch.autograd.grad
        self.fused: list[tuple[Any, Any]] = []  # norms' results, by weak references, and the nodes that pass them by
        self.norms: dict[int, Any] = {}  # by id, what the results of norms were made from; until the critic returns
        self.hooked = False  # the critic put a hook on a tensor or node, which must see every gradient

    def end(self) -> None:
        """The critic has returned. Results that are still alive may be asked for a gradient, or get a hook."""
        for result, node in self.fused:
            if result() is not None:
                node.apart = True
        self.fused.clear()
        self.norms.clear()


def wants(ctx: Any, slot: int, recording: Recording | None = None, edge: int | None = None) -> bool:
    """Whether the running backward uses the gradient of this Function's argument `slot`.

    `ctx.needs_input_grad` alone says whether the argument requires grad, and stays True for weights under
    `torch.autograd.grad(scores, x)`. `edge` is the argument's place among those that are tensors, where it differs.
    """
    if not ctx.needs_input_grad[slot]:
        return False
    if recording is not None and recording.weights_wanted:
        return True
    node: Any = ctx.next_functions[slot if edge is None else edge][0]
    if isinstance(node, _ENTRY):
        return not node.closed
    try:
        return _will_run(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad returns: the engine refuses the question
        return True


def records(g: Tensor) -> bool:
    """Whether the running backward, of gradient g, must itself be made of Functions, to be differentiated."""
    return torch.is_grad_enabled() and not under_vmap(g)


class Node(torch.autograd.Function):
    """A Function without the care that `apply` takes of torch.func transforms, which `reroutable` has ruled out: that
    care is a third of what a small critic's node costs."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class Entry(Node):
    """The identity at x, before the critic. Once its node is `closed`, no gradient in x is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.closed = False
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> Tensor | None:
        return grad_out


_ENTRY: Any = Entry._backward_cls


def reroutable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the rows know these arguments: plain, dense, real floating-point tensors, outside torch.func transforms
    and forward-mode differentiation; and x carries a gradient."""
    if type(x.grad_fn) is _MODULE_HOOK:  # a module's backward hook runs only if a gradient comes, be it zeros
        return False
    if not x.requires_grad or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    for t in (x, *others):
        if t is not None and not (
            type(t) in _TYPES and t.dtype in _DTYPES and t.layout is torch.strided and not t.is_nested
        ):
            return False
    return True


_MODULE_HOOK: Any = BackwardHookFunction._backward_cls
_TYPES = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments of an op that autocast runs in its lower precision, cast as autocast would."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocast_float32(*tensors: Tensor | None, device: str = "cuda") -> tuple[Tensor | None, ...]:
    """The arguments of an op that autocast runs in float32 on that device, and as it comes on others."""
    if not torch.is_autocast_enabled(device):
        return tensors
    halves = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t is not None and t.device.type == device and t.dtype in halves else t for t in tensors)


def autocast_unknown(x: Tensor) -> bool:
    """Whether autocast is on for a device whose choices of dtype the rows do not know."""
    return x.device.type not in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)
