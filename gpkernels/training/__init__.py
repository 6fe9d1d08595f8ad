"""The reference trainer. Nothing else in gpkernels imports it."""

from gpkernels.training.callbacks import Callback
from gpkernels.training.config import TrainConfig
from gpkernels.training.learner import Learner
from gpkernels.training.loop import Trainer
from gpkernels.training.presets import PRESETS, from_preset

__all__ = ["PRESETS", "Callback", "Learner", "TrainConfig", "Trainer", "from_preset"]
