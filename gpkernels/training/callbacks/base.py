"""The events of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer


class Callback:
    """Override what you want to hear of. An exception in a callback ends the run; `trainer.stop()` ends it early."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, or the first after a resume."""

    def on_step(self, trainer: Trainer, terms: dict[str, Tensor]) -> None:
        """After each step, of number `trainer.step`; `terms` are detached scalars on the device, not yet waited for."""

    def on_log(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After a line of the log: its numbers by name, `step` and `epoch` among them, and timings, which the log
        itself has not: since the line before `images_per_second`, and `input_share`, the share of the time in which
        steps waited for their images."""

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        """After an epoch, or the last step of a run, before the checkpoint; epochs count from 1."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written, into the folder `path`."""

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        """After the last checkpoint; `finished` is False when the run was stopped early."""

    def on_close(self, trainer: Trainer) -> None:
        """Last of all, also after an error, even one before `on_start`: close what you opened."""
