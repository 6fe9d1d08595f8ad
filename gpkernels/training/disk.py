"""Files that are whole or not there, and folders that one run at a time may use."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpkernels.errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: runs are not kept apart there, nor can large data be prepared (os.pwrite)
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_CANNOT = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}
"""What a file system answers that does not know what it is asked for: links, syncing of folders."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def write_atomically(path: Path, write: Callable[[Any], Any]) -> None:
    """Calls `write(file)` on a temporary file beside `path` and renames it: `path` is never half written.

    Raises OSError, with nothing left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with named(path), temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def write(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that nobody reads yet, down to the disk."""
    with named(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Makes the names in a folder survive a power failure, where the system can."""
    with _if_possible():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link(path: Path, target: str) -> None:
    """Makes `path` a link to `target` beside it, at once, where the file system has links. What copies follow links
    leave there, a folder in its place, is deleted."""
    if path.is_dir() and not path.is_symlink():
        delete(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with _if_possible():
        temporary.symlink_to(target)
        temporary.replace(path)
    sync(path.parent)


def delete(path: Path) -> None:
    """Deletes a file, a link or a folder, if it is there. A folder leaves its name before it is emptied."""
    if path.is_dir() and not path.is_symlink():
        leaving = path.with_suffix(".tmp")
        if leaving != path:
            shutil.rmtree(leaving, ignore_errors=True)
            path.rename(leaving)
        shutil.rmtree(leaving)
    else:
        path.unlink(missing_ok=True)


class FolderLock:
    """`with FolderLock(folder):` no other process, nor another lock in this one, has the folder.

    Raises UserError if one has. The system gives the lock back when the process ends, however it ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> FolderLock:
        self._file = (self.folder / LOCK).open("ab+", buffering=0)
        try:
            self._lock()
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().decode() or "another process"
            self._file.close()
            raise UserError(f"--out: wanted a folder that no run uses, got {self.folder}, used by {holder}") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"--out: the file system of {self.folder} locks no files ({error.strerror}): that no other run uses "
                "the folder is not checked",
                RuntimeWarning,
                stacklevel=2,
            )


def check_free(folder: Path) -> None:
    """Raises UserError if `folder` cannot be written to, or made, or another run uses it. Makes nothing."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"--out: wanted a folder, got {folder}, where {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out: wanted a folder that can be written to, got {folder} (not allowed in {nearest})")
    if (folder / LOCK).exists():
        with FolderLock(folder):
            pass


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError within, of a full disk for one, names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def _if_possible() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT:
            raise


def sha256(file: Path) -> str:
    """As the tool sha256sum prints it."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**22):
            digest.update(block)
    return digest.hexdigest()
