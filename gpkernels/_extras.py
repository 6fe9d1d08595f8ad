"""Libraries that only some commands use."""

from __future__ import annotations

import importlib

from gpkernels.errors import UserError


def need(what: str, *names: str) -> None:
    """Raises UserError, which says how to get it, for the first of the modules that `what` cannot import."""
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            raise UserError(f"{what} wants {name}, which is not installed: pip install 'gpkernels[train]'") from None
