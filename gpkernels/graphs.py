"""A training step as a CUDA graph: one launch by the host instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpkernels._checks import check_count, fail


def graphed(
    step: Callable[..., Any], *, warmup: int = 3, generators: Sequence[torch.Generator] = ()
) -> Callable[..., Any]:
    """`step`, captured as a CUDA graph once it has run `warmup` times, and replayed from then on.

        critic_step = gp.graphed(critic_step)
        for real, z in batches:
            losses = critic_step(real, z)

    The first `warmup` calls run `step` as it is, on a stream of their own, so that libraries choose their kernels and
    optimizers allocate their state; the next call captures it; that and every later call copies its arguments into
    the graph's inputs and replays. No call is lost or repeated: n calls are n steps. Interpolation weights and noise
    are drawn inside the graph, from a state that the replay advances, so each replay draws fresh numbers, those that
    the step would have drawn.

    Args:
        step: takes CUDA tensors, whose shapes, dtypes and device stay the same, and returns a tensor, or a tuple, list
            or dict of tensors, or None. It may run a critic forward, penalties, backward and an optimizer made with
            `capturable=True`. It must not read a value back (`.item()`, `print`), and what it branches on in Python is
            fixed at capture. Clear gradients inside, with `set_to_none=True`.
        warmup: calls before the capture, at least 1 (at least 11 under DistributedDataParallel).
        generators: CUDA generators that `step` draws from, besides the default one.

    Returns:
        A function of the same arguments. What it returns is overwritten by its next call.
    Raises:
        TypeError, ValueError: when called with anything but CUDA tensors, or other shapes than at capture.
        RuntimeError: from torch, where `step` does what a graph cannot hold.
    """
    if not callable(step):
        raise TypeError(f"step: wanted a callable, got {type(step).__name__}")
    return _Graphed(step, check_count("warmup", warmup), generators)


class _Graphed:
    def __init__(self, step: Callable[..., Any], warmup: int, generators: Sequence[torch.Generator]) -> None:
        self.step = step
        self.remaining = warmup
        self.generators = tuple(generators)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.result: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        _check_inputs(inputs, self.inputs if self.graph else inputs)
        if self.remaining:
            self.remaining -= 1
            return self._on_a_stream_of_its_own(inputs)
        if self.graph is None:
            self._capture(inputs)
        assert self.graph is not None
        for static, given in zip(self.inputs, inputs, strict=True):
            if static is not given:
                static.copy_(given)
        self.graph.replay()
        return self.result

    def _on_a_stream_of_its_own(self, inputs: tuple[Tensor, ...]) -> Any:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = self.step(*inputs)
        current.wait_stream(side)
        return result

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(x.detach().clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            self.result = self.step(*self.inputs)
        self.graph = graph


def _check_inputs(inputs: tuple[Tensor, ...], captured: tuple[Tensor, ...]) -> None:
    if len(inputs) != len(captured):
        raise fail("inputs", f"{len(captured)} tensors, as at capture", len(inputs))
    for i, (x, other) in enumerate(zip(inputs, captured, strict=True)):
        name = f"inputs[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: wanted a torch.Tensor, got {type(x).__name__}")
        if x.device.type != "cuda":
            raise fail(name, "a CUDA tensor, since graphs are CUDA's", f"one on {x.device}")
        if (x.shape, x.dtype, x.device) != (other.shape, other.dtype, other.device):
            wanted = f"shape {tuple(other.shape)}, {other.dtype} on {other.device}, as at capture"
            raise fail(name, wanted, f"shape {tuple(x.shape)}, {x.dtype} on {x.device}")
