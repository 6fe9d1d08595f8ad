"""The hooks on every torch.optim.Optimizer that move u and v after a step.

A weight counts as changed by a step if its version or address moved between the step's start and its end, or, for
optimizers that write through `.data` and leave versions alone, if the step had a gradient for it. An optimizer that
wraps another has the weights updated once, by whichever of the two ends first after the change. A step that
`torch.amp.GradScaler` makes a fused optimizer skip changes nothing; on a GPU, where asking would mean to wait, it
counts.

Weights that were changed between steps are looked at before the next one: see `Group.settle`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gpkernels.double_backward.mode import never_compiled


class Stepped(Protocol):
    """Something with weights, whose vectors it moves."""

    def watched(self) -> Iterable[Any]:
        """(layer, weight)"""

    def settle(self, members: list[Any]) -> None:
        """Before a step, of layers in training mode whose weights were changed since the last."""

    def stepped(self, members: list[Any]) -> None:
        """After a step, of layers in training mode whose weights it changed."""


Mark = tuple[int, ...]
"""What identifies the content of a tensor: id, address, version."""

_lock = threading.Lock()
_installed = False
_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_starts: weakref.WeakKeyDictionary[Any, tuple[int, dict[int, Mark | None]]] = weakref.WeakKeyDictionary()
_clock = 0


def mark(x: Tensor) -> Mark | None:
    """None for an inference tensor, which has no version."""
    try:
        return id(x), x.data_ptr(), x._version
    except RuntimeError:
        return None


def tick() -> int:
    """The time of an update: later updates have larger ones."""
    global _clock
    _clock += 1
    return _clock


def watch(group: Stepped) -> None:
    """Calls `group.stepped` after the steps that change its weights, as long as the group lives."""
    global _installed
    with _lock:
        _watched.add(group)
        if not _installed:
            _installed = True
            reason = (
                "gpkernels moves the vectors of spectral norm outside compiled code: compile the loss, not the step"
            )
            register_optimizer_step_pre_hook(never_compiled(_before, reason))
            register_optimizer_step_post_hook(never_compiled(_after, reason))


def _groups() -> list[Any]:
    with _lock:
        return list(_watched)


def _before(optimizer: Any, args: Any, kwargs: Any) -> None:
    marks = {}
    for group in _groups():
        replaced = []
        for member, weight in group.watched():
            now = marks[id(weight)] = mark(weight)
            if now != member.known.mark and member.training:
                replaced.append(member)
        if replaced:
            group.settle(replaced)
    _starts[optimizer] = _clock, marks


def _after(optimizer: Any, args: Any, kwargs: Any) -> None:
    started, marks = _starts.pop(optimizer, (_clock, {}))
    groups = _groups()
    if not groups or _is_skipped(optimizer):
        return
    given = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for group in groups:
        training = []
        for member, weight in group.watched():
            if _is_changed(member, weight, started, marks, given):
                if member.training:
                    training.append(member)
                else:
                    member.known.forget()
            elif member.known.update is None or member.known.mark != mark(weight):
                member.known.drop()
        if training:
            group.stepped(training)


def _is_skipped(optimizer: Any) -> bool:
    found = getattr(optimizer, "found_inf", None)  # set by GradScaler for the time of the step
    return isinstance(found, Tensor) and not found.is_cuda and bool(found)


def _is_changed(member: Any, weight: Tensor, started: int, marks: dict[int, Mark | None], given: set[int]) -> bool:
    now = mark(weight)
    if now is not None and now != marks.get(id(weight)):
        return now != member.known.mark
    return id(weight) in given and member.known.at <= started
