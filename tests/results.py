"""Result files of the benchmarks and experiments."""

import csv


def table(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def numbers(rows, *left_out):
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]
