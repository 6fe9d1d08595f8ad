"""What a person sees while training: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


def summary(record: Mapping[str, Any]) -> str:
    return (
        f"D {record['critic_loss']:+.4f}  G {record['generator_loss']:+.4f}  gap {record['gap']:+.4f}  "
        f"|grad| {record['grad_norm']:.4f}  {record['images_per_second']:.0f} img/s"
    )


class Reporter:
    """`with Reporter(total) as report: report.update(step, epoch, record); report.say(text)`."""

    def __init__(self, total: int, done: int = 0, what: str = "training") -> None:
        self.total = total
        self.console = Console(highlight=False, soft_wrap=True)
        self.live = sys.stdout.isatty()
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
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
            self._bar.update(self._task, completed=done, text=text)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS or done == self.total:
            self._last_line = time.monotonic()
            self.say(f"{done}/{self.total}  {text}")
            sys.stdout.flush()
