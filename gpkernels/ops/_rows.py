"""The registry rows of an op: one for each backend."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from gpkernels import _support, registry
from gpkernels.ops._library import kernel, triton_kernel


def register_backends(
    op: str,
    reference: ModuleType,
    names: tuple[str, ...],
    missing_row: Callable[..., str] = lambda **options: "",
) -> None:
    """Registers every backend of `op`.

    `names` are the raw ops: forward, backward and, where there is one, double backward. The reference has functions of
    these names, and so has the module `triton` beside it. `missing_row(**options)` says what in a call's options the
    kernels do not know; empty when they know it all.
    """

    def with_rows(supports: Callable[..., tuple[bool, str]]) -> Callable[..., tuple[bool, str]]:
        def both(tensor: torch.Tensor, **options: Any) -> tuple[bool, str]:
            reason = missing_row(**options)
            return (False, reason) if reason else supports(tensor)

        return both

    triton_module = reference.__name__.replace(".reference", ".triton")
    backends = {
        "reference": (_support.always, [getattr(reference, name) for name in names]),
        "cpu": (with_rows(_support.native_cpu), [kernel(name) for name in names]),
        "triton": (with_rows(_support.triton), [triton_kernel(name, triton_module) for name in names]),
        "cuda": (with_rows(_support.native_cuda), [kernel(name) for name in names]),
    }
    for backend, (supports, functions) in backends.items():
        registry.register(registry.Implementation(op, backend, supports, *functions))
