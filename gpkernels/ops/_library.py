"""The raw ops: every schema, fake and default implementation, in one place.

A raw op has no derivative of its own: the autograd Functions of `gpkernels/ops/<op>/autograd.py` link each to the
next. Called on tensors that require grad, outside such a Function, a raw op raises. C++ adds its kernels for a
device (`csrc/registration.cpp`); on any other device an op runs its reference.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_library = torch.library.Library("gpkernels", "DEF")
_triton_library = torch.library.Library("gpkernels_triton", "DEF")
_defined: dict[str, tuple[str, Callable[..., Any]]] = {}


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers the op of `schema`, its reference for every device, and the shapes of its results."""
    name = schema.partition("(")[0]
    _defined[name] = schema, fake
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gpkernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.gpkernels, name).default

    def without_derivative(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
            raise RuntimeError(
                f"torch.ops.gpkernels.{name} is a raw kernel without a derivative, called on a tensor that requires "
                "grad: call the function of the gpkernels package instead"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, without_derivative, "Autograd")


def _tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from (t for t in a if isinstance(t, torch.Tensor))


def kernel(name: str) -> Callable[..., Any]:
    """The op as a plain function, for use inside an autograd Function."""
    op = getattr(torch.ops.gpkernels, name).default
    boxed = op._op  # what op(*args) calls, without its Python frame
    is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
    below_autograd = torch._C._AutoDispatchBelowAutograd

    def call(*args: Any) -> Any:
        if is_compiling() or is_grad_enabled():  # with gradients on the op looks whether it would lose one
            return op(*args)
        guard = below_autograd()  # in force until deleted: half the cost of a with statement
        try:
            return boxed(*args)
        finally:
            del guard

    call.__name__ = name
    return call


def triton_kernel(name: str, module: str) -> Callable[..., Any]:
    """The launcher `name` of `module`, which is imported, and triton with it, at the first call.

    Under torch.compile it is the op `gpkernels_triton::name`, so that the compiler sees a schema and a fake instead of
    the launcher's own code.
    """

    @functools.cache
    def launcher() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    def launch(*args: Any) -> Any:
        return launcher()(*args)

    schema, fake = _defined[name]
    _triton_library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _triton_library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gpkernels_triton::{name}", fake, lib=_triton_library)
    op = getattr(torch.ops.gpkernels_triton, name).default

    def call(*args: Any) -> Any:
        return op(*args) if torch.compiler.is_compiling() else launch(*args)

    call.__name__ = name
    return call
