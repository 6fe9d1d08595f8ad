"""Where the bytes of images lie: the files of a folder, or the members of a zip that is read in place."""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from gpkernels.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
MAX_BYTES = 2**28
"""Of a file or a member; a larger one is no image of a data set and is not read."""
MAX_RATIO = 100
"""How much larger than its compressed bytes a member or a page of more than `_FREE` may be; images hardly shrink."""
CHUNK = 64
_FREE = 2**20


@dataclass(frozen=True)
class Text:
    """A text file that goes with images. `stamp` changes with its content."""

    where: str
    stamp: str
    read: Callable[[], str]


class Source(ABC):
    """Members numbered from 0 in the order of `names`, which are posix paths relative to `where`.

    `refused`: what was left out as unsafe to read, with the reason. Reading is safe from several threads at once.
    """

    where: Path
    names: Sequence[str]
    refused: Sequence[str] = ()

    @abstractmethod
    def read(self, members: Sequence[int]) -> Iterator[bytes | Exception]:
        """The bytes of each; an exception stands for a member that cannot be read."""

    @abstractmethod
    def stamps(self) -> Iterable[str]:
        """A line for each member (or shard of them) that changes with its content; no path above `where` in it."""

    def label(self, member: int) -> str:
        """What a person calls a member."""
        return shown(f"{self.where}/{self.names[member]}")

    def without_images(self, option: str, suffixes: Sequence[str]) -> UserError:
        refused = f"; the first of {len(self.refused)} refused: {self.refused[0]}" if self.refused else ""
        return UserError(f"{option}: wanted images ({', '.join(suffixes)}) in {self.where}, got none{refused}")

    def chunks(self, members: Sequence[int]) -> list[range]:
        """Positions in `members` that one thread reads in one go, and that a preparation finishes together."""
        return [range(begin, min(begin + CHUNK, len(members))) for begin in range(0, len(members), CHUNK)]


def fingerprint(stamps: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for stamp in stamps:
        digest.update(stamp.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


class Files(Source):
    """The files below a folder whose names end in `suffixes`, by size and time of change."""

    def __init__(self, where: Path, suffixes: Sequence[str] = SUFFIXES, *, below: bool = True) -> None:
        self.where = where
        found = sorted(
            _walk(where, "", below, suffixes),
            key=lambda entry: entry[0].split("/"),
        )
        self.names = [name for name, _ in found]
        self._stamps = [f"{name}\t{status.st_size}\t{status.st_mtime_ns}" for name, status in found]

    def read(self, members: Sequence[int]) -> Iterator[bytes | Exception]:
        for member in members:
            try:
                with (self.where / self.names[member]).open("rb") as file:
                    content = file.read(MAX_BYTES + 1)
                yield content if len(content) <= MAX_BYTES else too_large(f"more than {MAX_BYTES}")
            except OSError as error:
                yield error

    def stamps(self) -> Iterable[str]:
        return self._stamps


class Zip(Source):
    """The images in a zip file, read in place and never extracted, by size and checksum.

    Members that an extraction would have to fear are refused: absolute paths, `..`, links, encrypted ones, a name that
    comes twice, more than MAX_BYTES or MAX_RATIO. Raises UserError for a damaged file.
    """

    def __init__(self, where: Path, option: str) -> None:
        self.where = where
        try:
            self._zip = zipfile.ZipFile(where)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise UserError(f"{option}: wanted a zip file, got {where}, which is none or damaged ({error})") from None
        self.refused: list[str] = []
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if info.is_dir() or _hidden(info.filename.replace("\\", "/")):
                continue
            if reason := self._why_not(info):
                self.refused.append(f"{shown(f'{where}/{info.filename}')}: {reason}")
            else:
                self._members[info.filename] = info
        self.names = sorted((name for name in self._members if suffix(name) in SUFFIXES), key=lambda n: n.split("/"))

    def _why_not(self, info: zipfile.ZipInfo) -> str:
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
            return "refused, its path leads out of the archive"
        if stat.S_ISLNK(info.external_attr >> 16):
            return "refused, it is a link"
        if info.filename in self._members:
            return "refused, its name comes twice"
        if info.flag_bits & 1:
            return "refused, it is encrypted"
        if info.file_size > MAX_BYTES:
            return str(too_large(info.file_size))
        try:
            refuse_ratio(info.file_size, info.compress_size)
        except ValueError as error:
            return str(error)
        return ""

    def keep(self, names: Sequence[str]) -> None:
        self.names = names

    def text(self, name: str) -> Text | None:
        """The member of this name, in whichever folder it lies."""
        for path, info in self._members.items():
            if PurePosixPath(path).name == name:
                return Text(f"{self.where / path}", self._stamp(info), lambda info=info: self._text(info))  # type: ignore[misc]
        return None

    def _text(self, info: zipfile.ZipInfo) -> str:
        return self._content(info).decode(errors="replace")

    def _content(self, info: zipfile.ZipInfo) -> bytes:
        try:
            return self._zip.read(info)
        except OSError:
            raise
        except Exception as error:  # zlib.error, lzma.LZMAError, BadZipFile, EOFError, NotImplementedError, ...
            raise ValueError(f"damaged in the archive ({error})") from None

    def read(self, members: Sequence[int]) -> Iterator[bytes | Exception]:
        for member in members:
            try:
                yield self._content(self._members[self.names[member]])
            except (OSError, ValueError) as error:
                yield error

    @staticmethod
    def _stamp(info: zipfile.ZipInfo) -> str:
        return f"{info.filename}\t{info.file_size}\t{info.CRC:08x}"

    def stamps(self) -> Iterable[str]:
        return [self._stamp(self._members[name]) for name in self.names]


def text_file(path: Path) -> Text | None:
    """None where there is no such file."""
    if not path.is_file():
        return None
    status = path.stat()
    stamp = f"{path.name}\t{status.st_size}\t{status.st_mtime_ns}"
    return Text(str(path), stamp, lambda: path.read_text(errors="replace"))


def check_path(option: str, path: Path, *, also: str = "") -> None:
    """Raises UserError unless `path` is a folder, a .zip file, or a file of the suffix `also`."""
    if not path.is_dir() and not (path.is_file() and path.suffix.lower() in (".zip", also)):
        wanted = "a folder or a .zip file" if not also else f"a folder, a .zip or a {also} file"
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{option}: wanted {wanted}, got {path}, which {what}")


def shown(name: str) -> str:
    """As it may be printed: an archive may hold names that would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in name)


def refuse_ratio(size: int, compressed: int) -> None:
    """Raises ValueError for what claims to grow as no image does."""
    if size > _FREE and size > MAX_RATIO * max(compressed, 1):
        raise ValueError(f"refused, {size} bytes from {compressed} compressed ones")


def too_large(size: object) -> ValueError:
    return ValueError(f"wanted at most {MAX_BYTES} bytes, got {size}")


def _walk(root: str | Path, prefix: str, below: bool, suffixes: Sequence[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Files of these suffixes below `root` but the hidden ones; links to folders are not followed."""
    with os.scandir(root) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(".") or name == "__MACOSX":
                continue
            if entry.is_dir(follow_symlinks=False):
                if below:
                    yield from _walk(entry.path, f"{prefix}{name}/", below, suffixes)
            elif suffix(name) in suffixes and entry.is_file():
                yield prefix + name, entry.stat()


def stem(name: str) -> str:
    """000001 of img_align_celeba/000001.jpg. Without pathlib, which takes seconds for 200,000 names."""
    return posixpath.splitext(posixpath.basename(name))[0]


def suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _hidden(name: str) -> bool:
    """As `.thumbnails`, the `._` files and the folder `__MACOSX` that macOS adds to archives."""
    return any((part[:1] == "." and part != "..") or part == "__MACOSX" for part in name.split("/"))
