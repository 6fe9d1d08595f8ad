"""CelebA's lists: the text files of its authors (attributes: a count, a header, rows) and the CSVs that Kaggle made."""

from __future__ import annotations

from dataclasses import dataclass

from gpkernels.errors import UserError
from gpkernels.training.data.sources import Text, shown, stem


@dataclass(frozen=True)
class Table:
    """Rows, name and values, by the stem of their image's name (as 000001).

    `stated` is the count that the file gives, None without.
    """

    where: str
    option: str
    names: list[str]
    rows: dict[str, list[str]]
    stated: str | None = None

    def check(self, wanted: str, values: tuple[str, ...], *, width: int) -> None:
        """Raises UserError, naming the row, unless each holds `width` of `values`."""
        allowed = set(values)
        for row in self.rows.values():
            if len(row) != width + 1 or not allowed.issuperset(row[1:]):
                got = shown(" ".join(row)[:60])
                raise UserError(f"{self.option}: wanted {wanted} in the rows of {self.where}, got {got!r}")


def read_table(text: Text, option: str, *, counted: bool) -> Table:
    """A text file, with count and header where `counted`, or a CSV with a header, by its name's suffix."""
    lines = text.read().lstrip("\ufeff").splitlines()
    stated = None
    if text.where.lower().endswith(".csv"):
        table = [line.replace(",", " ").split() for line in lines]
        names, body = (table[0][1:] if table else []), table[1:]
    else:
        table = [line.split() for line in lines]
        stated = lines[0].strip() if counted and lines else None
        names, body = (table[1] if table[1:] else []) if counted else [], table[2:] if counted else table
    rows: dict[str, list[str]] = {}
    for row in filter(None, body):
        name = stem(row[0])
        if name in rows:
            raise UserError(
                f"{option}: wanted one row for each image in {text.where}, got two for {shown(row[0][:60])}"
            )
        rows[name] = row
    return Table(text.where, option, names, rows, stated)
