"""The reference trainer. Nothing else in gpkernels imports it."""

from gpkernels.training.config import TrainConfig
from gpkernels.training.loop import Trainer
from gpkernels.training.presets import PRESETS, from_preset

__all__ = ["PRESETS", "TrainConfig", "Trainer", "from_preset"]
