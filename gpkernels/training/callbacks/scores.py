"""Numbers that are taken after each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkernels.training.callbacks.base import Callback

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer


class ClassificationError(Callback):
    """`classification_error` of held-out images in the log, where the critic is a classifier and data is held out."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        error = trainer.classification_error()
        if error is not None:
            trainer.log({"step": trainer.step, "epoch": epoch, "classification_error": error})
