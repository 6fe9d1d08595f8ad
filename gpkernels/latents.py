"""Distributions of latent vectors z, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

LATENTS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "normal": lambda *shape, generator: torch.randn(*shape, generator=generator),
        "uniform": lambda *shape, generator: torch.rand(*shape, generator=generator) * 2 - 1,
    }
)
"""draw(*shape, generator=...) of each, float32 on the CPU: N(0, 1) and U[-1, 1)."""
