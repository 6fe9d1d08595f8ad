"""Images in the rows of parquet shards, as Hugging Face has them: a column `image`, struct{bytes, path} or binary."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpkernels.errors import UserError
from gpkernels.training.data import pages
from gpkernels.training.data.sources import MAX_BYTES, Source, too_large

_COLUMN = "image"
_SPLIT = re.compile(r"(train|valid|val|test)(?:idation)?(?![a-z])", re.IGNORECASE)
_BATCH = 64


class Parquet(Source):
    """Rows of shards, in the order of the shards' names; by size and time of change. Wants pyarrow.

    Raises UserError for a shard that is damaged or has no column of images.
    """

    def __init__(self, where: Path, shards: Sequence[Path], option: str) -> None:
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError:
            raise UserError(f"{option}: parquet files want pyarrow: pip install 'gpkernels[parquet]'") from None
        self.where, self.shards, self._option = where, sorted(shards), option
        self.names: list[str] = []
        self._begins: list[int] = []  # of each row group, as member numbers; then the end
        self._groups: list[tuple[int, int]] = []  # the shard of each row group, and its number there
        self._columns: list[str] = []  # with the bytes, of each shard
        for number, shard in enumerate(self.shards):
            file = self._open(shard)
            self._columns.append(self._bytes_column(shard, file.schema_arrow))
            begin = len(self.names)
            for group, rows in enumerate(self._rows(shard, file.metadata)):
                self._begins.append(begin)
                self._groups.append((number, group))
                begin += rows
            self.names += [f"{shard.relative_to(where)} row {row}" for row in range(begin - len(self.names))]
        self._begins.append(len(self.names))

    def _open(self, shard: Path) -> Any:
        import pyarrow as pa
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(shard)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self._option}: wanted a parquet file, got {shard}, which is none or damaged ({reason})"
            ) from None

    def _rows(self, shard: Path, metadata: Any) -> list[int]:
        """Of each row group."""
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        size = shard.stat().st_size
        if sum(counts) > size or min(counts, default=0) < 0:
            raise UserError(
                f"{self._option}: wanted fewer rows than the {size} bytes of {shard}, got {sum(counts)}: it is damaged"
            )
        return counts

    @staticmethod
    def _dictionary(shard: Path, group: Any, column: str) -> int:
        """As `pages.dictionary_bytes`, of a column in a row group's metadata."""
        chunks = (group.column(index) for index in range(group.num_columns))
        return max(pages.dictionary_bytes(shard, chunk) for chunk in chunks if chunk.path_in_schema == column)

    def _bytes_column(self, shard: Path, schema: Any) -> str:
        import pyarrow as pa

        if _COLUMN in schema.names:
            kind = schema.field(_COLUMN).type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                return f"{_COLUMN}.bytes"
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return _COLUMN
        raise UserError(
            f"{self._option}: wanted a column {_COLUMN!r} of struct{{bytes, path}} or binary in {shard}, "
            f"got columns {', '.join(schema.names)[:200]}"
        )

    def chunks(self, members: Sequence[int]) -> list[range]:
        """One for each row group that has some of `members`, which are in ascending order."""
        edges = np.unique(np.searchsorted(np.asarray(members), self._begins))
        return [range(int(a), int(b)) for a, b in itertools.pairwise(edges)]

    def read(self, members: Sequence[int]) -> Iterator[bytes | Exception]:
        """`members` lie in one row group, in ascending order; it is streamed, a page and a batch of rows at a time."""
        import pyarrow as pa

        group = int(np.searchsorted(self._begins, members[0], side="right")) - 1
        wanted = {member - self._begins[group] for member in members}
        number, inner = self._groups[group]
        row = given = 0
        try:
            file = self._open(self.shards[number])
            name = self._columns[number]
            repeated = self._dictionary(self.shards[number], file.metadata.row_group(inner), name)
            rows = min(_BATCH, MAX_BYTES // max(repeated, 1)) or 1  # each may be all of the dictionary
            for batch in file.iter_batches(rows, row_groups=[inner], columns=[name]):
                column = batch.column(0)
                values = column.field("bytes") if pa.types.is_struct(column.type) else column
                for value in values:
                    if row in wanted:
                        yield self._checked(value)
                        given += 1
                    row += 1
        except (pa.ArrowException, OSError, ValueError, UserError) as error:
            reason = ValueError(f"damaged row group ({str(error).splitlines()[0]})")
            yield from [reason] * (len(members) - given)

    @staticmethod
    def _checked(value: Any) -> bytes | Exception:
        if not value.is_valid:
            return ValueError("wanted the bytes of an image, got null")
        buffer = value.as_buffer()
        return buffer.to_pybytes() if buffer.size <= MAX_BYTES else too_large(buffer.size)

    def stamps(self) -> Iterable[str]:
        for shard in self.shards:
            status = shard.stat()
            yield f"{shard.relative_to(self.where).as_posix()}\t{status.st_size}\t{status.st_mtime_ns}"

    def splits(self) -> np.ndarray | None:
        """The part that each row belongs to, from the names of its shard or folder: (N,), "train", "valid", "test".

        None where a shard's name does not say.
        """
        parts: list[str] = []
        for shard in self.shards:
            for word in reversed(shard.relative_to(self.where).parts):
                if found := _SPLIT.match(word):
                    parts.append({"val": "valid"}.get(found[1].lower(), found[1].lower()))
                    break
            else:
                return None
        counts = np.diff(self._begins)
        return np.repeat([parts[number] for number, _ in self._groups], counts)

    def booleans(self) -> tuple[list[str], np.ndarray]:
        """The names of the columns of bool that every shard has, and their values: (N, columns), bool."""
        import pyarrow as pa

        names: list[str] | None = None
        for shard in self.shards:
            schema = self._open(shard).schema_arrow
            here = [field.name for field in schema if pa.types.is_boolean(field.type)]
            names = here if names is None else [name for name in names if name in here]
        names = names or []
        if not names:
            return [], np.zeros((len(self.names), 0), bool)
        tables = [self._flags(shard, names) for shard in self.shards]
        columns = [[table.column(name).fill_null(False).to_numpy() for name in names] for table in tables]
        return names, np.concatenate([np.stack(values, axis=1).astype(bool) for values in columns])

    def _flags(self, shard: Path, names: list[str]) -> Any:
        """A table of these columns of bool."""
        file = self._open(shard)
        try:
            for group in range(file.num_row_groups):
                for name in names:
                    self._dictionary(shard, file.metadata.row_group(group), name)
        except ValueError as error:
            raise UserError(f"{self._option}: wanted columns of bool in {shard}, got a damaged one ({error})") from None
        return file.read(columns=names)
