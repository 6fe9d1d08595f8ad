"""Zero propagation in a traced graph of aten calls: what is known to be zero is not computed.

Eager autograd fills gradients that do not exist with zeros, and convolves them. In a graph they can be seen: calls that
make zeros, calls that are linear in one, and sums with one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_aten: Any = torch.ops.aten

_MAKES = {_aten.zeros, _aten.zeros_like, _aten.new_zeros}
_LINEAR: dict[Any, tuple[int, ...]] = {  # zero where any of these arguments is
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten.reshape, _aten.expand, _aten.permute, _aten.t), (0,)),
    **dict.fromkeys((_aten.transpose, _aten.clone, _aten.detach, _aten.neg, _aten.sum, _aten.mean), (0,)),
    **dict.fromkeys((_aten.unsqueeze, _aten.squeeze, _aten.select, _aten.slice, _aten._to_copy), (0,)),
    **dict.fromkeys((_aten.div, _aten.leaky_relu_backward, _aten.threshold_backward), (0,)),
    **dict.fromkeys((_aten.mul, _aten.mm, _aten.bmm), (0, 1)),
    _aten.convolution_backward: (0,),
}


def propagate(graph: fx.GraphModule) -> int:
    """Takes zeros out of a graph that make_fx made, in place; it computes what it did. Returns how many calls went."""
    before = len(graph.graph.nodes)
    zero: set[fx.Node] = set()
    for node in list(graph.graph.nodes):
        packet = getattr(node.target, "overloadpacket", node.target)
        if _is_zero(node, packet, zero):
            zero.add(node)
        elif packet in (_aten.add, _aten.sub) and not node.kwargs and len(node.args) == 2:
            _drop_term(node, packet, zero)
    for node in zero:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not set(node.users) <= zero:
            with graph.graph.inserting_after(node):
                how = {"dtype": value.dtype, "device": value.device}
                made = graph.graph.call_function(_aten.zeros.default, (list(value.shape),), how)
            node.replace_all_uses_with(made)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return before - len(graph.graph.nodes)


def _is_zero(node: fx.Node, packet: Any, zero: set[fx.Node]) -> bool:
    if node.op != "call_function":
        return False
    if packet in _MAKES:
        return True
    if packet is operator.getitem:
        return node.args[0] in zero
    if packet is _aten.convolution:
        bias = node.args[2]
        return any(a in zero for a in node.args[:2]) and (bias is None or bias in zero)
    return any(node.args[i] in zero for i in _LINEAR.get(packet, ()))


def _drop_term(node: fx.Node, packet: Any, zero: set[fx.Node]) -> None:
    """a + 0, 0 + a and a - 0 are a, where that has the sum's shape and dtype."""
    terms = node.args if packet is _aten.add else node.args[:1]
    for i, term in enumerate(terms):
        other = node.args[1 - i]
        if other in zero and isinstance(term, fx.Node) and term not in zero:
            wanted, got = node.meta["val"], term.meta["val"]
            if (wanted.shape, wanted.dtype) == (got.shape, got.dtype):
                node.replace_all_uses_with(term)
                return
    if all(term in zero for term in node.args):
        zero.add(node)
