"""The trainer: a learner that keeps everything about its run in one folder.

A run folder holds config.json, log.jsonl (a line every `log_every` steps), samples/epoch_NNNN.png (the averaged
generator on the same latent vectors), curves.png, sessions.json and checkpoint.pt.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.errors import UserError
from gpkernels.training import checkpoint
from gpkernels.training.callbacks import Callback, ClassificationError, Curves, Samples, Sessions
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import ImageSet
from gpkernels.training.learner import Learner
from gpkernels.training.log import Log
from gpkernels.training.processes import Processes


class Trainer(Learner):
    """Trains `config` on `images` into the folder `out`, and tells `callbacks` of it.

    `resume` is a state from `checkpoint.load`: training goes on after its step, and on a CPU ends with the same
    bits as a run that was never interrupted. `run` returns True when the run is finished, False when `stop` ended it
    early; both leave a checkpoint. Of several processes the main one writes and tells; callbacks run there alone, so
    they must not make calls that all processes have to make.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: ImageSet | Any,
        out: Path,
        *,
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        objective: Any = None,
        callbacks: Sequence[Callback] = (),
        resume: dict[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(config, images, generator=generator, critic=critic, objective=objective, processes=processes)
        self.out = out
        self.callbacks = (Sessions(), ClassificationError(), Samples(), Curves(), *callbacks)
        self._stopping = False
        if resume is not None:
            self.load_state_dict(resume)

    def stop(self) -> None:
        """Ends `run` after the step it is in, on all processes."""
        self._stopping = True

    def run(self) -> bool:
        if not self.processes.main:
            self._train()
            return self.step >= self.total_steps
        self.out.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config.to_dict(), indent=2).encode()
        checkpoint.write_atomically(self.out / "config.json", lambda file: file.write(config))
        self._log = Log(self.out, self.step)
        try:
            self._tell("on_start")
            self._train()
            self.save()
            finished = self.step >= self.total_steps
            self._tell("on_end", finished)
        finally:
            self._log.close()
            self._tell("on_close")
        return finished

    def _train(self) -> None:
        started, images, waited = time.perf_counter(), 0, self.input_seconds
        while self.step < self.total_steps and not self.processes.any(self._stopping):
            terms = self.train_step()
            self._tell("on_step", terms)
            images += self._step_images
            last = self.step == self.total_steps
            if self.step % self.config.log_every == 0 or self.step == 1 or last:
                seconds = time.perf_counter() - started
                share = (self.input_seconds - waited) / seconds
                self.log(self._record(terms), images_per_second=images / seconds, input_share=share)
                started, images, waited = time.perf_counter(), 0, self.input_seconds
            epochs = self.epochs_after(self.step)
            if epochs > self.epochs_after(self.step - 1):
                self._tell("on_epoch", epochs)
                self.save()
            elif last:
                self._tell("on_epoch", epochs + 1)

    def log(self, record: dict[str, Any], **timing: float) -> None:
        """Adds `record`, which holds its step, to the log, and tells the callbacks; they are told `timing` too, which
        no log repeats from run to run."""
        if not self.processes.main:
            return
        self._log.write(record)
        self._tell("on_log", {**record, **timing})

    def save(self) -> None:
        if not self.processes.main:
            return
        path = self.out / checkpoint.NAME
        checkpoint.save(path, self.state_dict())
        self._tell("on_checkpoint", path)

    def _tell(self, event: str, *what: Any) -> None:
        for callback in self.callbacks if self.processes.main else ():
            getattr(callback, event)(self, *what)

    def _record(self, terms: dict[str, Tensor]) -> dict[str, Any]:
        """Means over the processes: a call that all have to make. A step that overflowed float16 has no terms."""
        record: dict[str, Any] = {"step": self.step, "epoch": self.epochs_after(self.step - 1) + 1}
        found = torch.stack([value.double() for value in terms.values()])
        record |= zip(terms, self.processes.mean(found).tolist(), strict=True)
        norms = self.processes.gather(self.grad_norms())
        record |= {"grad_norm": norms.mean().item(), "grad_norm_max": norms.max().item(), **self.weight_gradients()}
        bad = [name for name, value in record.items() if not math.isfinite(value)]
        if bad and self.precision.overflowed():
            return {name: value for name, value in record.items() if name not in terms and name not in bad}
        if bad:
            raise UserError(
                f"training diverged: {bad[0]} is {record[bad[0]]} at step {self.step}; the last checkpoint is kept "
                f"in {self.out} (try a lower --lr)"
            )
        return record
