"""Formulas in y, as one writes them: "-softplus(-y)", "min(0, y - 1)", "-(y - 2)^2".

Numbers, y, + - * / ^ (or **), parentheses and FUNCTIONS; nothing else is evaluated.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpkernels._checks import fail

Formula = Callable[[Tensor], Tensor]

_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "atan": torch.atan,
    "cos": torch.cos,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "logsigmoid": F.logsigmoid,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "softplus": lambda y: -F.logsigmoid(-y),
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
}
_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"max": torch.maximum, "min": torch.minimum}

FUNCTIONS = tuple(sorted({*_ONE, *_TWO}))
"""What a formula may call; min and max take two arguments, the others one."""

_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_UNARY: Mapping[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}


def parse(text: str, name: str = "formula") -> Formula:
    """The function of y that `text` spells, elementwise, of any shape and floating dtype, differentiable to any order.

    Raises ValueError, naming `name`, for anything but a formula in y.
    """
    shown = repr(text if len(text) <= 60 else text[:60] + "...")
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        value = _Builder(shown, name).build(tree)
    except (SyntaxError, OverflowError, RecursionError, MemoryError):
        raise fail(name, "a formula in y", shown) from None
    return lambda y: value(y).expand_as(y)


class _Builder:
    def __init__(self, shown: str, name: str) -> None:
        self.shown, self.name = shown, name

    def build(self, node: ast.expr) -> Formula:
        match node:
            case ast.Constant(value=bool()):
                pass
            case ast.Constant(value=int() | float() as number):
                constant = float(number)
                return lambda y: y.new_full((), constant)
            case ast.Name(id="y"):
                return lambda y: y
            case ast.UnaryOp() if type(node.op) in _UNARY:
                apply, inner = _UNARY[type(node.op)], self.build(node.operand)
                return lambda y: apply(inner(y))
            case ast.BinOp(right=ast.Constant(value=int() | float() as power)) if isinstance(node.op, ast.Pow):
                base = self.build(node.left)
                return lambda y: base(y) ** power
            case ast.BinOp() if type(node.op) in _BINARY:
                join, left, right = _BINARY[type(node.op)], self.build(node.left), self.build(node.right)
                return lambda y: join(left(y), right(y))
            case ast.Call(func=ast.Name(id=called), args=[argument], keywords=[]) if called in _ONE:
                function, only = _ONE[called], self.build(argument)
                return lambda y: function(only(y))
            case ast.Call(func=ast.Name(id=called), args=[one, other], keywords=[]) if called in _TWO:
                choose, first, second = _TWO[called], self.build(one), self.build(other)
                return lambda y: choose(first(y), second(y))
        wanted = "a formula of y, numbers, + - * / ^, " + ", ".join(FUNCTIONS)
        raise fail(self.name, wanted, f"{ast.unparse(node)!r} in {self.shown}")
