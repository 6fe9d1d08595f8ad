"""What a person sees while training: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.console import Console

from gpkernels.training.callbacks import Callback

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer

_LINE_SECONDS = 10.0


def _summary(record: Mapping[str, Any]) -> str:
    return (
        f"D {record['critic_loss']:+.4f}  G {record['generator_loss']:+.4f}  gap {record['gap']:+.4f}  "
        f"|grad| {record['grad_norm']:.4f}  {record['images_per_second']:.0f} img/s"
    )


class Reporter:
    """`with Reporter(total) as report: report.update(step, epoch, record); report.say(text)`."""

    def __init__(self, total: int, done: int = 0, what: str = "training", *, quiet: bool = False) -> None:
        self.total = total
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.live = sys.stdout.isatty() and not quiet
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
    """Tells a Reporter how far a run is, at each line of the log."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def on_log(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if "critic_loss" in record:
            self.reporter.update(record["step"], f"epoch {record['epoch']}  {_summary(record)}")
