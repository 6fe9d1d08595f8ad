"""What can go wrong with a machine while it trains, told as one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gpkernels.errors import UserError
from gpkernels.training.config import IMAGE_SIZES, TrainConfig, flag

_OF_32_PIXELS = ("lfw-mini", "fashion-mnist")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_SMALLER: dict[str, tuple[str, Callable[[Any, TrainConfig], bool]]] = {
    "batch_size": ("lower", lambda value, config: value > 2),
    "accumulate": ("higher", lambda value, config: value < config.batch_size),
    "precision": ("bf16", lambda value, config: value == "fp32"),
    "image_size": ("lower", lambda value, config: value > min(IMAGE_SIZES)),
    "ngf": ("lower", lambda value, config: value > 1),
    "ndf": ("lower", lambda value, config: value > 1),
}
"""What bounds the memory of a step, which way, and whether it can still go that way."""


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
        values = {name: getattr(config, name) for name in _SMALLER}
        values["image_size"] = config.image_size or (32 if config.data.startswith(_OF_32_PIXELS) else 64)
        helps = [name for name, value in values.items() if _SMALLER[name][1](value, config)]
        advice = ", ".join(f"{flag(name)} {_SMALLER[name][0]} (now {values[name]})" for name in helps)
        advice = advice or "a machine with more of it"
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"out of memory ({reason[:200]}); what helps: {advice}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU, for which torch has no class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(
        isinstance(error, RuntimeError) and _MEMORY.search(str(error))
    )
