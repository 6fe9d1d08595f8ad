"""The log of a run: log.jsonl, a JSON object a line, each with its step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpkernels.training.checkpoint import write_atomically

NAME = "log.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    path = folder / NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class Log:
    """Appends to the log in `folder`, after dropping the lines that an interrupted run wrote after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        kept = "".join(json.dumps(record) + "\n" for record in read(folder) if record["step"] <= step)
        write_atomically(folder / NAME, lambda file: file.write(kept.encode()))
        self._file = (folder / NAME).open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
