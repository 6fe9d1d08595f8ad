"""What can go wrong with a machine while it trains, told as one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig, flag

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_SMALLER = {  # what bounds the memory of a step, and which way; those a config does not have are left out
    "batch_size": "lower",
    "accumulate": "higher",
    "precision": "bf16",
    "image_size": "lower",
    "ngf": "lower",
    "ndf": "lower",
}


@contextlib.contextmanager
def explained(config: TrainConfig, out: Path) -> Iterator[None]:
    """Within it, a full disk, a folder that cannot be written to and memory that does not suffice are UserErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"--out: no space left ({error.strerror}) for {error.filename or out}; the checkpoints before it are "
                f"whole. Free some, then: gpkernels train --out {out} --resume"
            ) from error
        if error.errno in _READ_ONLY and error.filename and Path(error.filename).is_relative_to(out):
            raise UserError(
                f"--out: wanted a folder that can be written to, got {out} ({error.filename}: {error.strerror})"
            ) from error
        raise
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        values = {name: getattr(config, name) for name in _SMALLER if hasattr(config, name)}
        advice = ", ".join(f"{flag(name)} {_SMALLER[name]} (now {value})" for name, value in values.items())
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"out of memory ({reason[:200]}); what helps: {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU, for which torch has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(
        isinstance(error, RuntimeError) and _MEMORY.search(str(error))
    )
