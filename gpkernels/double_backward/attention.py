"""Attention: its fused kernels have no second derivative, so a penalty runs the one made of plain operations."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from gpkernels.double_backward._nodes import Recording

_lock = threading.RLock()  # torch's choice of a kernel is of the process


def by_math(function: Callable[..., Any]) -> Callable[..., Any]:
    """The row of a function that runs scaled dot-product attention."""

    def row(recording: Recording, *args: Any, **kwargs: Any) -> Any:
        with _lock, sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return row
