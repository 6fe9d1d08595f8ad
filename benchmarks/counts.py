"""What a step asks of any device: calls, convolutions, bytes, arithmetic, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FREE = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
}
"""Calls that only make views or reserve memory."""


@dataclass
class Counts:
    ops: int = 0
    convolutions: int = 0
    bytes: int = 0
    flops: int = 0  # of convolutions and matrix products


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name not in _FREE:
            self.counts.ops += 1
            touched = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.counts.bytes += sum({t.data_ptr(): t.nbytes for t in touched if t.numel()}.values())
            if func.overloadpacket in flop_registry:
                self.counts.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            if name == "convolution":
                self.counts.convolutions += 1
            elif name == "convolution_backward":
                self.counts.convolutions += sum(map(bool, args[-1][:2]))
            elif name == "conv2d_input_gradient":
                self.counts.convolutions += 1
                grad_out, weight = args[:2]
                self.counts.flops += 2 * grad_out.numel() * weight[0].numel()
        return result


def count(step: Callable[[], object]) -> Counts:
    """The counts of one call of `step`."""
    with _Counting() as mode:
        step()
    return mode.counts


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """What one call of `step` adds to the memory of tensors, at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
