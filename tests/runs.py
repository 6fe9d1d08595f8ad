"""Runs of the trainer that end early."""

from gpkernels.training import Callback, Trainer


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, terms):
        if trainer.step == self.step:
            trainer.stop()


def stopped_after(trainer: Trainer, step: int) -> Trainer:
    trainer.callbacks = (*trainer.callbacks, StopAfter(step))
    return trainer
