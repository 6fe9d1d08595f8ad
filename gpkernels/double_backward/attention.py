"""Attention: its fused kernels have no second derivative, so a penalty runs the one made of plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from gpkernels.double_backward._nodes import Recording


def by_math(function: Callable[..., Any]) -> Callable[..., Any]:
    """The row of a function that runs scaled dot-product attention."""

    def row(recording: Recording, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return row
