"""The reference trainer. Nothing else in gpkernels imports it.

    images = ImageSet.from_arrays(pixels)                       # or data.load(config), or a torch data set
    config = from_preset("wgan-gp", {"steps": 1000})            # or TrainConfig(...), or from_file("config.json")
    Trainer(config, images, Path("runs/mine"), callbacks=[Progress(), Trackers("tensorboard"), Report()]).run()

`generator=`, `critic=` and `objective=` take the place of the config's own: `plugins` says what they are.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpkernels.training.callbacks import Callback, Report, Trackers
    from gpkernels.training.config import TrainConfig
    from gpkernels.training.config_file import from_file
    from gpkernels.training.data import ImageSet
    from gpkernels.training.learner import Learner
    from gpkernels.training.loop import Trainer
    from gpkernels.training.presets import PRESETS, from_preset
    from gpkernels.training.progress import Progress

__all__ = [
    "PRESETS",
    "Callback",
    "ImageSet",
    "Learner",
    "Progress",
    "Report",
    "Trackers",
    "TrainConfig",
    "Trainer",
    "from_file",
    "from_preset",
]

_HOMES = {
    "PRESETS": "presets",
    "Callback": "callbacks",
    "ImageSet": "data",
    "Learner": "learner",
    "Progress": "progress",
    "Report": "callbacks",
    "Trackers": "callbacks",
    "TrainConfig": "config",
    "Trainer": "loop",
    "from_file": "config_file",
    "from_preset": "presets",
}


def __getattr__(name: str) -> Any:
    """Imported when asked for: the command line, which reads the settings, does not need the trainer's libraries."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
