"""The command line of a benchmark, where and with what it was measured, and the file of its results."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import gpkernels as gp

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def parser(module: str, doc: str | None, rounds: int, *, picture: bool = False) -> argparse.ArgumentParser:
    """The flags of `python -m benchmarks.<module>`, which measures cases that have names and may draw them."""
    flags = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=doc)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--rounds", type=int, default=rounds)
    flags.add_argument("--quick", action="store_true", help="few rounds, small critics")
    flags.add_argument("--only", default="", help="only the cases whose name contains this")
    flags.add_argument("--out", type=Path, help="write the rows to this CSV file")
    if picture:
        flags.add_argument("--picture", type=Path, help="draw the rows into this PNG file")
    return flags


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def label(device: torch.device) -> str:
    """What result files are named after."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "torch": torch.__version__,
        "gpkernels": gp.__version__,
        "commit": _commit(),
        "date": today(),
    }


def _cpu() -> str:
    """Its name, which clouds shorten, and so its family and model where the system tells them; the widest instructions
    that torch uses."""
    path = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.processor())
    if "cpu family" in found:
        name += f" family {found['cpu family']} model {found['model']}"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


CODE = ("gpkernels", "csrc", "benchmarks/*.py", "setup.py")


def _commit() -> str:
    """That of the code, "-dirty" where it differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", *CODE) else "")


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows with the same keys as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def save_picture(figure: Figure, path: Path, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Writes a figure of rows as a PNG file, with where and when they were measured above it."""
    first = rows[0]
    about = f"{first['machine']}, torch {first['torch']}, {first['date']}"
    figure.suptitle(f"{title}\n{about}" if title else about, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
