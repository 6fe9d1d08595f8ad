"""What a run tells, and what is done with it: logs, pictures, progress.

`Trainer(config, images, out, callbacks=[...])` calls them in their order, after those that every run has.
"""

from gpkernels.training.callbacks.base import Callback
from gpkernels.training.callbacks.pictures import Curves, Samples
from gpkernels.training.callbacks.report import Report
from gpkernels.training.callbacks.scores import ClassificationError
from gpkernels.training.callbacks.sessions import Sessions
from gpkernels.training.callbacks.trackers import Trackers

__all__ = ["Callback", "ClassificationError", "Curves", "Report", "Samples", "Sessions", "Trackers"]
