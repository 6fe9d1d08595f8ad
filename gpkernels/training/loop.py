"""The trainer: a learner that keeps everything about its run in one folder.

A run folder holds config.json, log.jsonl (a line every `log_every` steps), samples/epoch_NNNN.png (the averaged
generator on the same latent vectors), curves.png, sessions.json and checkpoints/.
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
from gpkernels.training import checkpoint, disk, divergence
from gpkernels.training.callbacks import Callback, ClassificationError, Curves, Samples, Sessions
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import ImageSet
from gpkernels.training.divergence import NotFinite
from gpkernels.training.failures import explained
from gpkernels.training.learner import Learner
from gpkernels.training.log import Log
from gpkernels.training.models.norms import statistics
from gpkernels.training.processes import Processes


class Trainer(Learner):
    """Trains `config` on `images` into the folder `out`, and tells `callbacks` of it.

    `resume` is a state from `checkpoint.load`: training goes on after its step, and on a CPU ends with the same
    bits as a run that was never interrupted. `run` returns True when the run is finished, False when `stop` ended it
    early; both leave a checkpoint, as do the start, every epoch and every `checkpoint_minutes`. Of several processes
    the main one writes and tells; callbacks run there alone, so they must not make calls that all have to make.

    Raises UserError, the checkpoints before it left whole: for a folder that holds a run where `resume` is None, that
    another run uses, or that cannot be written to, for a full disk, for memory that does not suffice, and for numbers
    that are not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: ImageSet | Any,
        out: Path | str,
        *,
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        objective: Any = None,
        callbacks: Sequence[Callback] = (),
        resume: dict[str, Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.out = out = Path(out)
        with explained(config, out):
            super().__init__(
                config, images, generator=generator, critic=critic, objective=objective, processes=processes
            )
        self.callbacks = (Sessions(), ClassificationError(), Samples(), Curves(), *callbacks)
        self._stopping = False
        self._log = Log(out)
        self._saved_at = time.monotonic()
        if resume is None:
            if self.processes.main:
                checkpoint.check_unused(out)
        else:
            self.load_state_dict(resume)

    def stop(self) -> None:
        """Ends `run` after the step it is in, on all processes."""
        self._stopping = True

    def run(self) -> bool:
        with explained(self.config, self.out):
            if not self.processes.main:
                return self._follow()
            self.out.mkdir(parents=True, exist_ok=True)
            with disk.FolderLock(self.out):
                try:
                    return self._run()
                except NotFinite as found:
                    raise UserError(divergence.explain(self, found)) from None

    def _follow(self) -> bool:
        """As a process that is not the main one."""
        try:
            self._train()
        except NotFinite as found:
            raise UserError(f"training diverged: {found}") from None
        return self.step >= self.total_steps

    def _run(self) -> bool:
        checkpoint.begin(self.out, self.step)
        config = json.dumps(self.config.to_dict(), indent=2).encode()
        disk.write_atomically(self.out / "config.json", lambda file: file.write(config))
        try:
            with self._log:
                self._tell("on_start")
                if not self._is_saved:
                    self.save()
                self._train()
                if not self._is_saved:
                    self._save_finite()
                finished = self.step >= self.total_steps
                self._tell("on_end", finished)
        finally:
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
            over = epochs > self.epochs_after(self.step - 1)
            if over or last:
                self._tell("on_epoch", epochs if over else epochs + 1)
            if over or last or time.monotonic() - self._saved_at >= 60 * self.config.checkpoint_minutes:
                self._save_finite()

    def log(self, record: dict[str, Any], **timing: float) -> None:
        """Adds `record`, which holds its step, to the log, and tells the callbacks; they are told `timing` too, which
        no log repeats from run to run."""
        if not self.processes.main:
            return
        self._log.write(record)
        self._tell("on_log", {**record, **timing})

    def save(self) -> None:
        """Writes a checkpoint, the newest of the `keep` that stay. Raises OSError."""
        if not self.processes.main:
            return
        self._log.sync()
        path = checkpoint.save(self.out, self.state_dict(), self.config.keep)
        self._saved_at = time.monotonic()
        self._tell("on_checkpoint", path)

    def _save_finite(self) -> None:
        if not self.processes.main:
            return
        divergence.check_weights({"generator": self.generator, "critic": self.critic}, self.step)
        self.save()

    @property
    def _is_saved(self) -> bool:
        newest = checkpoint.held(self.out)[:1]
        return bool(newest) and checkpoint.step_of(newest[0]) == self.step

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "log_lines": self._log.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._log.lines = state["log_lines"]

    def _tell(self, event: str, *what: Any) -> None:
        for callback in self.callbacks if self.processes.main else ():
            getattr(callback, event)(self, *what)

    def _record(self, terms: dict[str, Tensor]) -> dict[str, Any]:
        """Means over the processes: a call that all have to make. A step that overflowed float16 has no terms."""
        record: dict[str, Any] = {"step": self.step, "epoch": self.epochs_after(self.step - 1) + 1}
        found = torch.stack([value.double() for value in terms.values()])
        record |= zip(terms, self.processes.mean(found).tolist(), strict=True)
        if not self.config.sync_batchnorm:  # with those that a checkpoint has, so that a resumed run logs the same
            self.processes.share(statistics(self.critic))
        norms = self.processes.gather(self.grad_norms())
        record |= {"grad_norm": norms.mean().item(), "grad_norm_max": norms.max().item(), **self.weight_gradients()}
        bad = [name for name, value in record.items() if not math.isfinite(value)]
        if bad and self.precision.overflowed():
            return {name: value for name, value in record.items() if name not in terms and name not in bad}
        divergence.check_terms(record, self.step)
        return record
