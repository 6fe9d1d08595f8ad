"""Settings from a file: JSON as a run folder's config.json is written, or TOML with the same names."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig, setting_types, settings
from gpkernels.training.presets import from_preset

USUAL_PRESET = "ls-gan-pg"


def from_file(path: Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config of a file, with settings overridden; what the file leaves out is as its preset has it."""
    return with_overrides(path, overrides or {})


def with_overrides(path: Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """As `from_file`; without a file, of the preset among `overrides`."""
    values = {} if path is None else read(path)
    if overrides.get("preset", values.get("preset")) != values.get("preset") and values.get("preset") is not None:
        raise UserError(f"--preset: wanted {values['preset']}, which {path} starts from, got {overrides['preset']}")
    values = {**values, **overrides}
    return from_preset(values.pop("preset", USUAL_PRESET), values)


def read(path: Path) -> dict[str, Any]:
    """The settings in a file, by name. Raises UserError for what is not a setting, or not of its type."""
    try:
        values = _parse(path)
    except ValueError as error:  # of JSON, TOML and UTF-8 alike
        raise UserError(f"--config: {path} is not the {path.suffix[1:].upper()} it is named: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config: wanted settings by name in {path}, got a {type(values).__name__}")
    return {name: _checked(path, name, value) for name, value in values.items()}


def _parse(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix != ".toml":
        raise UserError(f"--config: wanted a file named .json or .toml, got {path}")
    try:
        import tomllib
    except ModuleNotFoundError:
        raise UserError(f"--config: wanted Python 3.11 or later for TOML, or JSON, got {path}") from None
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _checked(path: Path, name: str, value: Any) -> Any:
    """The value; a whole number as a float where the setting is one."""
    if name not in settings():
        near = difflib.get_close_matches(name.replace("-", "_"), settings(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--config: wanted settings of this version in {path}, got {name!r}{hint}")
    kind = setting_types()[name]
    if value is None and settings()[name].default is None:
        return None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"--config: wanted {kind.__name__} for {name} in {path}, got {value!r}")
    return value
