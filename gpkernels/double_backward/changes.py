"""Which arguments a call of torch may change: in place, or later through memory that it hands out.

`pointwise.rescue` copies those that a backward still needs. A call that is not known here is noticed all the same where
it moves the tensor's version: autograd then raises. What shares the memory without the version is listed, and
`tests/test_engine_changes.py` looks for more in every function of torch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

_ASSIGNING = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "idiv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)
_SHARING = frozenset(
    (
        *("detach", "data", "set", "set_", "set_data", "_unsafe_view"),
        *("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"),
        *("numpy", "data_ptr", "storage", "_typed_storage", "untyped_storage"),
    )
)
"""Names of functions after which other tensors, or others than torch, have the memory of an argument."""

_DATA = vars(torch._C.TensorBase)["data"].__get__


def changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A tree, or None, in which are the tensors that the call may change."""
    return _reach(func)(args, kwargs)


def _out(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("out")


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[:1], kwargs


def _all(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args, kwargs


@functools.lru_cache(maxsize=4096)
def _reach(func: Any) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any]:
    if isinstance(func, torch._ops.OpOverload):
        mutable, name = func._schema.is_mutable, func.__name__.partition(".")[0]
        return _all if mutable or name in _SHARING else _out
    name = getattr(func, "__name__", "")
    if name in _SHARING or name == "__set__" or func == _DATA:
        return _all
    if name in _ASSIGNING or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_"):
        return _first
    return _where_asked(func)


def _where_asked(func: Any) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any]:
    """Of a function that may have an argument `inplace`."""
    try:
        position = list(inspect.signature(func).parameters).index("inplace")
    except (TypeError, ValueError):  # without a signature, as torch's built-in functions are, or without `inplace`
        return _out

    def reach(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        in_place = args[position] if len(args) > position else kwargs.get("inplace")
        return _first(args, kwargs) if in_place else _out(args, kwargs)

    return reach
