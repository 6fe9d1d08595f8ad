"""The states of the random generators that torch, Python and NumPy share out to everyone.

The trainer draws from none of them while it trains; dropout in a net does, and a user's callbacks and data may.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def state(device: torch.device) -> dict[str, Any]:
    """Tensors, numbers and tuples of them: what `torch.load(weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def restore(saved: dict[str, Any], device: torch.device) -> None:
    """Puts a `state` back; that of a GPU if it was taken on one and `device` is one."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], device)
    random.setstate(saved["python"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
