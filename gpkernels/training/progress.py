"""What a person sees while training: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gpkernels.training.callbacks import Callback

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer

_LINE_SECONDS = 10.0


_SHOWN = {
    "critic_loss": "D {:+.4f}",
    "generator_loss": "G {:+.4f}",
    "gap": "gap {:+.4f}",
    "grad_norm": "|grad| {:.4f}",
    "images_per_second": "{:.0f} img/s",
    "input_share": "{:.0%} waiting",
}


def _summary(record: Mapping[str, Any]) -> str:
    return "  ".join(text.format(record[name]) for name, text in _SHOWN.items() if name in record)


class Reporter:
    """`with Reporter(total) as report: report.update(done, text); report.say(text)`."""

    def __init__(self, total: int, done: int = 0, what: str = "training") -> None:
        from rich import progress as bars
        from rich.console import Console

        self.total = total
        self.console = Console(highlight=False, soft_wrap=True)
        self.live = sys.stdout.isatty()
        self._last_line = 0.0
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=20),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.live,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, text="")

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def update(self, done: int, text: str) -> None:
        if self.live:
            self._bar.update(self._task, completed=done, total=self.total, text=text)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS or done == self.total:
            self._last_line = time.monotonic()
            self.say(f"{done}/{self.total}  {text}")
            sys.stdout.flush()


class Progress(Callback):
    """Says what a run is, and how far, at each line of the log."""

    def __init__(self) -> None:
        self._reporter: Reporter | None = None

    def on_start(self, trainer: Trainer) -> None:
        config, images = trainer.config, trainer.images
        self._reporter = Reporter(trainer.total_steps, trainer.step).__enter__()
        for reason in images.skipped:
            self._reporter.say(f"skipped {reason}")
        if images.note:
            self._reporter.say(f"note: {images.note}")
        self._reporter.say(
            f"{config.preset} on {len(images.images)} images of {images.size}x{images.size} ({images.name}), "
            f"{trainer.total_steps} steps of {config.batch_size} on {trainer.device} -> {trainer.out}"
        )
        for name, what in trainer.given.items():
            self._reporter.say(f"{name}: {what}")
        if trainer.step:
            self._reporter.say(f"resuming after step {trainer.step}")

    def on_log(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if self._reporter is not None and "critic_loss" in record:
            self._reporter.update(record["step"], f"epoch {record['epoch']}  {_summary(record)}")

    def on_close(self, trainer: Trainer) -> None:
        if self._reporter is not None:
            self._reporter.__exit__()
            self._reporter = None
