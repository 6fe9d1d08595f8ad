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
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return {
        "machine": name,
        "torch": torch.__version__,
        "gpkernels": gp.__version__,
        "commit": commit,
        "date": today(),
    }


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
