"""In which numbers a step computes: float32, or bfloat16 or float16 where autocast takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST_SCALE = 2.0**12
"""A penalty's gradient in the images starts from the scale itself, and float16 ends at 65504."""

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast, and for fp16 a gradient scaler of each net.

    Weights, their gradients and the optimizers stay float32; so do penalties, losses and the statistics of norms.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._dtype, self._device = DTYPES[name], device.type
        self.scalers = {
            net: torch.amp.GradScaler(device.type, FIRST_SCALE, enabled=name == "fp16")
            for net in ("generator", "critic")
        }

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device, self._dtype or torch.bfloat16, enabled=self._dtype is not None)

    def backward(self, net: str, loss: Tensor) -> None:
        self.scalers[net].scale(loss).backward()

    def step(self, net: str, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step with the true gradients, which are left there; none where one of them overflowed."""
        scaler = self.scalers[net]
        scaler.step(optimizer)
        scaler.update()

    def overflowed(self) -> bool:
        """Whether the last step of a net may have been left out, as now and then while a scale is sought: then what
        is not finite is so for its numbers' range. False where a scale has fallen below 1: that is divergence."""
        states = [scaler.state_dict() for scaler in self.scalers.values() if scaler.is_enabled()]
        return any(state["_growth_tracker"] == 0 for state in states) and all(state["scale"] >= 1 for state in states)

    def state_dict(self) -> dict[str, Any]:
        return {net: scaler.state_dict() for net, scaler in self.scalers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for net, scaler in self.scalers.items():
            if scaler.is_enabled():
                scaler.load_state_dict(state[net])
