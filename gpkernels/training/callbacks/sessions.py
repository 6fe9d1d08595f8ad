"""sessions.json: on what, from which step to which, and how long a run was trained, from each start or resume on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gpkernels import registry
from gpkernels._version import __version__
from gpkernels.training.callbacks.base import Callback
from gpkernels.training.disk import write_atomically

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer

NAME = "sessions.json"
_PACKAGES = ("torch", "triton", "numpy", "pillow", "accelerate")


def read(folder: Path) -> list[dict[str, Any]]:
    """Oldest first; one that was killed has no `to_step` and `seconds`."""
    file = folder / NAME
    return json.loads(file.read_text()) if file.is_file() else []


class Sessions(Callback):
    def on_start(self, trainer: Trainer) -> None:
        self._started = time.monotonic()
        self._sessions = read(trainer.out)
        about = trainer.about_images
        images = {"images": f"{about['name']} ({about['count']})"} if about["given"] else {}
        self._sessions.append(
            {
                "from_step": trainer.step,
                "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "device": str(trainer.device),
                "given": {**trainer.given, **images},
                "machine": machine(trainer.device),
                "versions": versions(),
            }
        )
        self._write(trainer)

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        seconds = round(time.monotonic() - self._started, 1)
        self._sessions[-1] |= {"to_step": trainer.step, "seconds": seconds}
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        content = json.dumps(self._sessions, indent=2).encode()
        write_atomically(trainer.out / NAME, lambda file: file.write(content))


def machine(device: torch.device) -> dict[str, str]:
    """What it is, in words; nothing that names it or whose it is."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {
        "processor": f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        found["gpu"] = f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"
    return found


def versions() -> dict[str, str]:
    found = {"gpkernels": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    usable = [name for name in registry.BACKENDS if registry.why_not(name) is None]
    return {**found, "backends": ", ".join(usable)}
