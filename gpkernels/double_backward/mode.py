"""Where calls of torch become the rows of the table."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gpkernels.double_backward._nodes import Recording
from gpkernels.double_backward.changes import changed
from gpkernels.double_backward.pointwise import rescue
from gpkernels.double_backward.table import BY_FUNCTION, NEEDED

_HOOKS: frozenset[Any] = frozenset(
    (torch.Tensor.register_hook, torch.Tensor.retain_grad, vars(torch._C.TensorBase)["grad_fn"].__get__)
)
"""What a critic must call to see or change a gradient inside."""


class Rerouting(TorchFunctionMode):
    """Sees every call of torch in its block, on this thread; reroutes those the table knows, with gradients on. Unless
    it pays, only those that have no second derivative otherwise."""

    def __init__(self, pays: bool = True) -> None:
        super().__init__()
        self.recording = Recording(pays)
        self.rows = BY_FUNCTION if pays else NEEDED

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.recording.end()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        row = self.rows.get(func)
        if row is not None and torch.is_grad_enabled() and not _under_checkpoint():
            result = row.call(self.recording, *args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func in _HOOKS:
            self.recording.hooked = True
        if not self.recording.active:
            return func(*args, **kwargs)
        may_change = changed(func, args, kwargs)
        if may_change is not None:
            for tensor in tree_leaves(may_change):
                if isinstance(tensor, Tensor):
                    rescue(tensor)
        return func(*args, **kwargs)


def _under_checkpoint() -> bool:
    """Inside torch.utils.checkpoint, whose recomputation must see the very calls of the first pass."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


@contextmanager
def fast_double_backward() -> Iterator[None]:
    """Makes the second derivative of what is computed inside cheaper; values and derivatives stay what they are.

    For penalties written by hand. Run the critic inside; what follows may lie inside or outside:

        with gp.fast_double_backward():
            scores = critic(x)
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        (loss + penalty_of(grad)).backward()

    Calls of torch that the table (`gpkernels.double_backward.table`) knows are rerouted to Functions with the same
    result whose second derivative makes no zeros, no unused gradients, and few launches; everything else runs as it
    is. `gradient_penalty` and `score_and_penalty` do this by themselves. Inside, torch.compile'd functions run
    uncompiled and attention runs by its math kernel, since compiled code and the fused attention kernels have no second
    derivative. A gradient that is zero for want of a path may be None instead. The result of a leaky ReLU or hardtanh
    may be changed in place as ever, except by TorchScript, whose calls are not seen: the backward then raises. Highest
    gradient order: as without it.
    """
    with rerouted(True):
        yield


def never_compiled(function: Callable[..., Any], reason: str = "") -> Callable[..., Any]:
    """Keeps torch.compile out of `function`: a graph break, and under fullgraph=True an error with the way out."""
    reason = reason or (
        f"gpkernels.{function.__name__} differentiates the critic twice, which compiled code cannot: call it outside "
        "the compiled function (the critic itself may be compiled; the penalty runs its original)"
    )
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function, reason=reason)
        return disabled(*args, **kwargs)

    # what torch.compiler.disable sets; itself it would import the compiler here
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    return call


SMALL = 2**21
"""Multiplications of a pass below which a critic is small: its Functions, a tenth of a millisecond a layer in Python,
cost more than they save. With norms, whose Functions cost most, eight times as many on a CPU; elsewhere norms are what
small critics wait for."""

_NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm)
_STRIDED = (torch.nn.modules.conv._ConvNd, torch.nn.modules.pooling._AvgPoolNd, torch.nn.modules.pooling._MaxPoolNd)


def pays(critic: Callable[..., Any], x: Tensor) -> bool:
    """Whether to reroute for this critic at x, of shape (B, ...). True where its size is not plain to see."""
    if not isinstance(critic, torch.nn.Module):
        return True
    products = _products(critic, x)
    slow = x.device.type == "cpu" and any(isinstance(module, _NORMS) for module in critic.modules())
    return products is None or len(x) * products >= (8 * SMALL if slow else SMALL)


def _products(critic: torch.nn.Module, x: Tensor) -> int | None:
    """Multiplications for a sample, as if the modules ran one after another in the order of their registration, each
    at the positions that the strides before it have left; None for weights that wait for a first call."""
    positions, products = math.prod(x.shape[2:]), 0
    for module in critic.modules():
        stride, transposed = _stride(module, x.dim() - 2), getattr(module, "transposed", False)
        if not transposed:
            positions = max(1, positions // stride)
        for parameter in module._parameters.values():
            if isinstance(parameter, UninitializedParameter):
                return None
            if parameter is not None:
                products += parameter.numel() * (positions if parameter.dim() > 2 else 1)
        if transposed:
            positions *= stride
    return products


def _stride(module: torch.nn.Module, dims: int) -> int:
    """The product of the strides of a convolution or a pool; 1 of other modules."""
    if not isinstance(module, _STRIDED):
        return 1
    stride: Any = module.stride
    return math.prod(stride) if isinstance(stride, tuple) else int(stride) ** dims


class rerouted:
    """fast_double_backward for the package's own penalties: `with rerouted(create_graph, pays) as recording`."""

    def __init__(self, create_graph: bool, pays: bool = True) -> None:
        self.mode = Rerouting(pays) if create_graph else None
        self.uncompiled = _Uncompiled()

    def __enter__(self) -> Recording:
        self.uncompiled.__enter__()
        if self.mode is None:
            return Recording(active=False)
        self.mode.__enter__()
        return self.mode.recording

    def __exit__(self, *error: Any) -> None:
        if self.mode is not None:
            self.mode.__exit__(*error)
        self.uncompiled.__exit__(*error)


class _Uncompiled:
    """Runs torch.compile'd functions as they were written. torch's stance is of the process: the first thread to come
    sets it, the last to leave restores it."""

    _lock = threading.Lock()
    _inside = 0
    _stance: Any = None

    def __enter__(self) -> None:
        self.entered = "torch._dynamo" in sys.modules
        if not self.entered:
            return
        with _Uncompiled._lock:
            if _Uncompiled._inside == 0:
                _Uncompiled._stance = torch.compiler.set_stance("force_eager")
                _Uncompiled._stance.__enter__()
            _Uncompiled._inside += 1

    def __exit__(self, *error: Any) -> None:
        if not self.entered:
            return
        with _Uncompiled._lock:
            _Uncompiled._inside -= 1
            if _Uncompiled._inside == 0:
                _Uncompiled._stance.__exit__(*error)
