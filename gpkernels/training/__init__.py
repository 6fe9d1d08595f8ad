"""The reference trainer. Nothing else in gpkernels imports it.

    images = ImageSet.from_arrays(pixels)                       # or data.load(config), or a torch data set
    config = from_preset("wgan-gp", {"steps": 1000})            # or TrainConfig(...), or from_file("config.json")
    Trainer(config, images, Path("runs/mine"), callbacks=[Progress(), Trackers("tensorboard"), Report()]).run()

`generator=`, `critic=` and `objective=` take the place of the config's own: `plugins` says what they are.
"""

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
