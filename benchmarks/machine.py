"""The command line of a benchmark, where and with what it was measured, and the file of its results."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gpkernels as gp


def parser(module: str, doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The flags of `python -m benchmarks.<module>`, which measures cases that have names."""
    flags = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=doc)
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--rounds", type=int, default=rounds)
    flags.add_argument("--quick", action="store_true", help="few rounds, small critics")
    flags.add_argument("--only", default="", help="only the cases whose name contains this")
    flags.add_argument("--out", type=Path, help="write the rows to this CSV file")
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
