"""Eval mode for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def eval_mode(*nets: nn.Module) -> Iterator[None]:
    """Inside, `nets` are in eval mode; after it, each of their modules is in the mode that it was in."""
    modes = {module: module.training for net in nets for module in net.modules()}
    try:
        for net in nets:
            net.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
