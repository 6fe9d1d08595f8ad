"""Pictures in the run folder: sample grids after each epoch, curves at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkernels.training import log, pictures
from gpkernels.training.callbacks.base import Callback

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer


class Samples(Callback):
    """samples/epoch_NNNN.png: the averaged generator, on the same latent vectors each time."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        folder = trainer.out / "samples"
        folder.mkdir(exist_ok=True)
        pictures.save_grid(folder / f"epoch_{epoch:04d}.png", trainer.sample(trainer.fixed_z))


class Curves(Callback):
    """curves.png: the numbers of the log over the steps."""

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        pictures.save_curves(trainer.out / "curves.png", log.read(trainer.out))
