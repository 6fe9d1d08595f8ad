"""report.html at the end of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkernels.training import report
from gpkernels.training.callbacks.base import Callback

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer


class Report(Callback):
    """`report.write` when a run is finished; one that was stopped may have its own by `gpkernels report RUN`."""

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if finished:
            report.write(trainer.out, trainer.config, trainer.step, trainer.ema, trainer.images)
