"""Checkpoints: one file that `torch.load(weights_only=True)` reads, written beside and renamed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpkernels.errors import UserError
from gpkernels.training import models
from gpkernels.training.config import TrainConfig

FORMAT = 1
NAME = "checkpoint.pt"
_KEYS = {
    "format",
    "config",
    "channels",
    "size",
    "classes",
    "step",
    "generator",
    "ema",
    "critic",
    "optimizers",
    "penalties",
    "precision",
    "rng",
}


def write_atomically(path: Path, write: Any) -> None:
    """Calls `write(file)` on a temporary file beside `path` and renames it: `path` is never half written."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: Path) -> dict[str, Any]:
    """The state saved at `path`, on the CPU. Raises UserError if it is not a whole checkpoint of this format."""
    if path.is_dir():
        path = path / NAME
    if not path.is_file():
        raise UserError(f"checkpoint: wanted a file, got {path}, which does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint: {path} is corrupted or not a checkpoint ({reason[:120]})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not set(state) >= _KEYS:
        raise UserError(f"checkpoint: {path} is not a gpkernels checkpoint of format {FORMAT}")
    return state


def load_weights(module: nn.Module, weights: dict[str, Any], name: str) -> None:
    """Loads `weights` into `module`. Raises UserError if they are of another architecture."""
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    got = {key: tuple(value.shape) for key, value in weights.items()}
    if wanted != got:
        key = sorted(set(wanted.items()) ^ set(got.items()))[0][0]
        raise UserError(
            f"checkpoint: its {name} is of another architecture than its config "
            f"({key}: wanted {wanted.get(key, 'no such tensor')}, got {got.get(key, 'no such tensor')})"
        )
    module.load_state_dict(weights)


def load_generator(path: Path, generator: nn.Module | None = None) -> tuple[Any, TrainConfig, int]:
    """The averaged generator of a checkpoint in eval mode, its config, and the step it was saved at.

    `generator` is wanted where the run was given one: a module of the same class, which gets the weights.
    """
    state = load(path)
    config = TrainConfig.from_dict(state["config"])
    given = state.get("given", {}).get("generator")
    if (given is None) != (generator is None):
        raise UserError(
            f"checkpoint: its generator is {given or 'the one its config names'}: wanted "
            f"load_generator(path{', generator=...' if given else ''})"
        )
    if generator is None:
        generator, _ = models.build(config, state["channels"], state["size"], state["classes"])
    load_weights(generator, state["ema"], "generator")
    return generator.eval(), config, state["step"]
