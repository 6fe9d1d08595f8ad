"""Prepared images: one uint8 .npy (N, 3, size, size) that training maps into memory, and a JSON sidecar.

Beside NAME.npy lie NAME.json and NAME.lock; while it is made NAME.part, the pixels behind an npy header, and
NAME.journal, a line for each chunk of images that is on disk in NAME.part. A preparation that was killed goes on after
those. The sidecar is renamed into place last, so where it is, the array is whole. The name holds a digest of all that
decides the pixels, so files of different settings or of a source that has changed since lie beside each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig
from gpkernels.training.data.decoding import Skipped, decode_chunks, decoder, jobs_here, nothing_readable
from gpkernels.training.data.listing import Attributes, Listing
from gpkernels.training.data.sidecar import FORMAT, Sidecar
from gpkernels.training.disk import sha256

AUTOMATIC = 2**28
"""Bytes of pixels from which training prepares a source by itself; a smaller one is decoded anew each time."""
_SYNC_SECONDS = 2.0
_OPTION = "--cache"

Progress = Callable[[int, int], None]


def cache_folder(config: TrainConfig) -> Path:
    """`config.cache`, $GPKERNELS_CACHE, $XDG_CACHE_HOME/gpkernels or ~/.cache/gpkernels."""
    if config.cache is not None:
        return Path(config.cache)
    if own := os.environ.get("GPKERNELS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpkernels"


def find(config: TrainConfig, listing: Listing, size: int) -> Sidecar | None:
    """The prepared file of these images, None where there is none that is whole."""
    return Sidecar.read(_path(config, listing, size), _settings(config, listing, size))


def find_without_source(config: TrainConfig, size: int) -> Sidecar | None:
    """A file that was prepared from `config.data` with these settings, wherever that is now; the newest of several."""
    wanted = {"data": full_name(config.data), **_given(config), "image_size": size}
    files = sorted(cache_folder(config).glob("*.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    found = (Sidecar.read(file.with_suffix(".npy"), wanted) for file in files)
    return next((sidecar for sidecar in found if sidecar is not None), None)


def prepare(
    config: TrainConfig, listing: Listing, size: int, progress: Progress, jobs: int | None = None
) -> tuple[Sidecar, int]:
    """The prepared file, and how many images were decoded for it now.

    One process prepares, others that want the same file wait for it. Raises UserError where the folder cannot be
    written, has too little room, or no image can be read.
    """
    path = _path(config, listing, size)
    wanted = _settings(config, listing, size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path, lambda: progress(_Part(path, listing, size).finished_images(), len(listing)))
        try:
            if (sidecar := Sidecar.read(path, wanted)) is not None:
                return sidecar, 0
            return _make(config, listing, path, size, wanted, progress, jobs or jobs_here())
        finally:
            lock.release()
    except OSError as error:
        raise UserError(
            f"{_OPTION}: wanted to write {path.name} in {path.parent}, got {error.strerror or error}"
        ) from None


def _locked(path: Path, waiting: Callable[[], None]) -> filelock.BaseFileLock:
    """The lock on a prepared file, which ends with its process; `waiting` is called each second until it is free."""
    lock = filelock.FileLock(path.with_suffix(".lock"))
    while True:
        try:
            lock.acquire(timeout=1)
            return lock
        except filelock.Timeout:
            waiting()


def _make(
    config: TrainConfig, listing: Listing, path: Path, size: int, wanted: dict[str, Any], progress: Progress, jobs: int
) -> tuple[Sidecar, int]:
    part = _Part(path, listing, size)
    attributes = _attributes(config, listing)
    skipped, decoded = part.fill(progress, jobs)
    good = np.setdiff1d(np.arange(len(listing)), [position for position, _ in skipped])
    if not len(good):
        part.remove()
        raise nothing_readable(config.data, skipped)
    part.close_gaps(good)
    sidecar = Sidecar(
        path=path,
        data=full_name(config.data),
        settings=wanted,
        name=listing.name,
        shape=(len(good), 3, size, size),
        sha256=sha256(part.pixels),
        decoder=decoder(),
        skipped=[*listing.source.refused, *(reason for _, reason in skipped)],
        labels=None if listing.labels is None else listing.labels[good],
        class_names=listing.class_names,
        attributes=None if attributes is None else Attributes(attributes.names, attributes.values[good]),
        no_attributes=listing.no_attributes,
    )
    part.pixels.replace(path)
    sidecar.write()
    part.remove()
    return sidecar, decoded


def _attributes(config: TrainConfig, listing: Listing) -> Attributes | None:
    """Those of the listing; None where they are damaged and this run can do without."""
    try:
        return listing.attributes()
    except UserError:
        if config.label_attribute is not None:
            raise
        return None


class _Part:
    """The unfinished file of a listing, and its journal."""

    def __init__(self, path: Path, listing: Listing, size: int) -> None:
        self.pixels, self.journal = path.with_suffix(".part"), path.with_suffix(".journal")
        self.listing, self.size = listing, size
        self.chunks = listing.chunks()

    @property
    def _row(self) -> int:
        return 3 * self.size * self.size

    def remove(self) -> None:
        self.pixels.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def finished(self) -> dict[int, Skipped]:
        """By chunk, the images that could not be read. Empty for a journal of other chunks."""
        try:
            lines = self.journal.read_text().splitlines()
            first, *rest = [json.loads(line) for line in lines if line.endswith(("}", "]"))]
        except (OSError, ValueError):
            return {}
        if first != self._head() or not self.pixels.is_file():
            return {}
        return {number: [(position, reason) for position, reason in skipped] for number, skipped in rest}

    def _head(self) -> dict[str, Any]:
        return {"format": FORMAT, "images": len(self.listing), "size": self.size, "chunks": len(self.chunks)}

    def finished_images(self) -> int:
        return sum(len(self.chunks[number]) for number in self.finished())

    def fill(self, progress: Progress, jobs: int) -> tuple[Skipped, int]:
        """Decodes what the journal does not have. Returns all that could not be read, and how many were decoded now."""
        finished = self.finished()
        before = done = sum(len(self.chunks[number]) for number in finished)
        if not finished:
            self._begin()
        progress(done, len(self.listing))
        todo = [number for number in range(len(self.chunks)) if number not in finished]
        # Plain writes: a full disk is an error, which behind a memory map would be a signal.
        target = os.open(self.pixels, os.O_RDWR)
        try:
            pending: dict[int, Skipped] = {}
            last = time.monotonic()

            def store(position: int, images: np.ndarray) -> None:
                view, offset = images.data.cast("B"), len(self._header(len(self.listing))) + position * self._row
                while view:
                    written = os.pwrite(target, view, offset)
                    view, offset = view[written:], offset + written

            for number, skipped in decode_chunks(self.listing, self.size, todo, store, jobs):
                pending[number] = skipped
                done += len(self.chunks[number])
                progress(done, len(self.listing))
                if time.monotonic() - last >= _SYNC_SECONDS:
                    self._note(target, pending)
                    finished |= pending
                    pending, last = {}, time.monotonic()
            self._note(target, pending)
            finished |= pending
        finally:
            os.close(target)
        return [entry for number in sorted(finished) for entry in finished[number]], done - before

    def _begin(self) -> None:
        """An empty file of full length, on a disk that has room for it, and a journal without a chunk."""
        header = self._header(len(self.listing))
        length = len(header) + len(self.listing) * self._row
        self.remove()
        free = os.statvfs(self.pixels.parent)
        if free.f_bavail * free.f_frsize < length:
            raise UserError(
                f"{_OPTION}: wanted {length / 1e9:.2f} GB free in {self.pixels.parent}, "
                f"got {free.f_bavail * free.f_frsize / 1e9:.2f} GB"
            )
        with self.pixels.open("wb") as file:
            file.write(header)
            file.truncate(length)
        self.journal.write_text(json.dumps(self._head()) + "\n")

    def _note(self, target: int, chunks: dict[int, Skipped]) -> None:
        """Into the journal once the pixels are on the disk."""
        os.fsync(target)
        with self.journal.open("a") as file:
            file.writelines(json.dumps([number, skipped]) + "\n" for number, skipped in chunks.items())
            file.flush()
            os.fsync(file.fileno())

    def close_gaps(self, good: np.ndarray) -> None:
        """Moves the images `good` together and gives the file its final length and header.

        What is moved is struck from the journal first, so a preparation killed here decodes it again.
        """
        count, total = len(good), len(self.listing)
        if count == total:
            return
        first = int(np.flatnonzero(good != np.arange(count))[0]) if (good != np.arange(count)).any() else count
        kept = {number: skipped for number, skipped in self.finished().items() if self.chunks[number].stop <= first}
        lines = [json.dumps(self._head()), *(json.dumps([number, skipped]) for number, skipped in kept.items())]
        beside = self.journal.with_suffix(".journal.tmp")
        beside.write_text("\n".join(lines) + "\n")
        beside.replace(self.journal)
        header = len(self._header(total))
        pixels = np.memmap(self.pixels, np.uint8, "r+", header, (total, self._row))
        for target in range(first, count):
            pixels[target] = pixels[good[target]]
        pixels.flush()
        with self.pixels.open("r+b") as file:
            file.write(self._header(count))
            file.truncate(header + count * self._row)
            os.fsync(file.fileno())

    def _header(self, count: int) -> bytes:
        """Of an npy file, 128 bytes whatever the count."""
        fields = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 3, {self.size}, {self.size}), }}"
        text = fields.encode().ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def full_name(data: str) -> str:
    """`kind:PATH` with the path made absolute."""
    kind, _, path = data.partition(":")
    return f"{kind}:{Path(path).absolute()}"


def _given(config: TrainConfig) -> dict[str, Any]:
    return {"split": config.split, "crop": config.crop, "max_images": config.max_images}


def _settings(config: TrainConfig, listing: Listing, size: int) -> dict[str, Any]:
    """What decides the images."""
    return {"source": listing.stamp, "image_size": size, "cut": listing.cut.name, **_given(config)}


def _path(config: TrainConfig, listing: Listing, size: int) -> Path:
    settings = _settings(config, listing, size)
    key = hashlib.sha256(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", f"{listing.name}-{config.split}-{size}-{listing.cut.name}-{key}")
    return (cache_folder(config) / name).with_name(f"{name}.npy")
