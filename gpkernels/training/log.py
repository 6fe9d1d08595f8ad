"""The log of a run: log.jsonl, a JSON object a line, each with its step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gpkernels.errors import UserError
from gpkernels.training import disk

NAME = "log.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log in `folder`; without the last one where it is still being written.

    Raises UserError for a line that is no JSON object.
    """
    records = []
    for number, line in enumerate(_whole_lines(folder / NAME), 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"{folder / NAME}: wanted a JSON object in line {number}, got {line[:60]!r}") from None
    return records


class Log:
    """Appends to the log in `folder`, within `with log:`, after its first `lines` lines, those that a checkpoint knows.

    What an interrupted run wrote after them is dropped, so no line is missing or double after a resume. Raises OSError,
    which names the file; the log then ends with a whole line.
    """

    def __init__(self, folder: Path, lines: int = 0) -> None:
        self.path, self.lines = folder / NAME, lines
        self._file: Any = None

    def __enter__(self) -> Log:
        kept = _whole_lines(self.path)[: self.lines]
        self.lines = len(kept)
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(sum(map(len, kept)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
        self._file = None

    def write(self, record: dict[str, Any]) -> None:
        end = os.fstat(self._file.fileno()).st_size
        rest = memoryview((json.dumps(record) + "\n").encode())
        with disk.named(self.path):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(end)
                raise
        self.lines += 1

    def sync(self) -> None:
        """Brings what is written down to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
