"""`gpkernels prepare`: decodes a data set once, into files that training maps into memory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from gpkernels._extras import need
from gpkernels.errors import UserError

_SETTINGS = ("data", "image_size", "crop", "split", "max_images", "cache")
_SHOWN = 20


def add_command(commands: Any) -> None:
    """Adds `prepare` to the subparsers of the command line."""
    from gpkernels.training.config import add_flag

    parser = commands.add_parser(
        "prepare",
        help="decode a data set once, for train to map into memory",
        description="Decodes folder:PATH or celeba:PATH once into a file of 8-bit pixels, which train with the same "
        "settings maps into memory; for celeba the test part, which evaluate uses, into a second one. A preparation "
        "that was stopped goes on where it was; a finished one is checked against its sha256. train does the same by "
        "itself for large data.",
    )
    of_data = {"required": True, "help": "folder:PATH or celeba:PATH, as for train"}
    for name in _SETTINGS:
        add_flag(parser, name, **(of_data if name == "data" else {}))
    parser.add_argument("--jobs", type=int, help="threads that decode (default: one for each core)")
    parser.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    need("prepare", "numpy", "PIL", "rich", "filelock")
    from gpkernels.training import data
    from gpkernels.training.config import TrainConfig

    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs: wanted at least 1, got {options.jobs}")
    config = TrainConfig(**{name: getattr(options, name) for name in _SETTINGS if hasattr(options, name)})
    kind, _, path = config.data.partition(":")
    if kind not in data.LISTINGS or not path:
        raise UserError(f"--data: wanted {' or '.join(f'{kind}:PATH' for kind in data.LISTINGS)}, got {config.data!r}")
    _prepare_one(config, kind, Path(path), options.jobs)
    test = data.test_part(config)
    if test is not None:
        try:
            _prepare_one(test, kind, Path(path), options.jobs)
        except data.EmptyPart:
            print("no test part: nothing will be held out")
    return 0


def _prepare_one(config: Any, kind: str, path: Path, jobs: int | None) -> None:
    from gpkernels.training import data, disk
    from gpkernels.training.data import prepared
    from gpkernels.training.progress import Reporter

    listing = data.LISTINGS[kind](config, path)
    size = data.size_of(config)
    ready = prepared.find(config, listing, size)
    if ready is not None and disk.sha256(ready.path) != ready.sha256:
        print(f"{ready.path} has another sha256 than its sidecar says: preparing it anew")
        ready.remove()
        ready = None
    if ready is not None:
        print(f"already prepared, sha256 as it should be: {ready.describe()}")
        return
    started = time.perf_counter()
    with Reporter(len(listing), what=f"preparing {listing.name} {config.split if kind == 'celeba' else ''}") as report:
        first: list[int] = []

        def progress(done: int, total: int) -> None:
            first.append(done)
            rate = (done - first[0]) / (time.perf_counter() - started)
            report.update(done, f"{rate:.0f} images/s")

        ready, decoded = prepared.prepare(config, listing, size, progress, jobs)
        for reason in ready.skipped[:_SHOWN]:
            report.say(f"skipped {reason}")
    if len(ready.skipped) > _SHOWN:
        print(f"skipped {len(ready.skipped) - _SHOWN} more, named in {ready.path.with_suffix('.json')}")
    seconds = time.perf_counter() - started
    print(f"{ready.describe()}; {decoded} decoded in {seconds:.1f} s, {decoded / seconds:.0f} images/s")
