"""Small runs of the trainer, such that end early, and their states compared."""

import json
from collections.abc import Mapping

import torch

from gpkernels.training import Callback, TrainConfig, Trainer


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, terms):
        if trainer.step == self.step:
            trainer.stop()


def stopped_after(trainer: Trainer, step: int) -> Trainer:
    trainer.callbacks = (*trainer.callbacks, StopAfter(step))
    return trainer


SMALL = {"ngf": 4, "ndf": 4, "batch_size": 4, "nz": 8, "log_every": 1}


def same(got, wanted, where=""):
    """Raises AssertionError unless two states are equal, their tensors to the bit."""
    if isinstance(wanted, Mapping):
        assert set(got) == set(wanted)
        for key, value in wanted.items():
            same(got[key], value, f"{where}/{key}")
    elif isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for index, pair in enumerate(zip(got, wanted, strict=True)):
            same(*pair, f"{where}/{index}")
    elif isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted), where
    else:
        assert got == wanted, where


def told(faces, out, *callbacks, resume=None, **settings):
    """A trainer of one epoch with these callbacks alone: the pictures of every run take longer than its training."""
    run = Trainer(TrainConfig(**{**SMALL, "epochs": 1, **settings}), faces, out, resume=resume)
    run.callbacks = callbacks
    return run


def log_lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def trainer(faces, out, *, resume=None, callbacks=(), **settings):
    return Trainer(TrainConfig(**{**SMALL, **settings}), faces, out, resume=resume, callbacks=callbacks)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())
