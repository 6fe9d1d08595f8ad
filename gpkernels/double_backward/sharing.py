"""One backward for scores and penalty, where the critic allows it.

Back-propagation is linear in its seed. For a critic whose samples do not meet and that is piecewise linear in x, the
adjoint of any loss of the scores is, at every layer, s_b = dLoss/dscore_b times the adjoint g that the penalty's
gradient in x already went through, and the second derivative sends nothing back along the forward. So loss and penalty
need one sweep together: the tangents t of the penalty, with the weight gradient of t + s x against g (see `bilinear`).
Parameters and arguments that enter elsewhere (a bias added by hand, a class embedding, the slopes of a PReLU) get the
loss's share from an ordinary backward that goes no deeper than they lie. What the critic itself makes of them is then
differentiated twice, once for each share, and must be known to be linear there; graphs from outside the critic are not,
since autograd goes through them after the merged backward, with the sum.

`share` walks the graph from the scores to x and takes this road only if every step is known to be of that kind. Any
other critic keeps the graph that autograd made, in which the two still share the forward and one sweep back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gpkernels.double_backward._nodes import Recording
from gpkernels.double_backward.bilinear import Apply
from gpkernels.double_backward.pointwise import Activate
from gpkernels.double_backward.pooling import Pool

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph


def share(
    scores: Tensor,
    penalty: Tensor,
    entry: Any,
    recording: Recording,
    scale: Tensor | None,
    arguments: Sequence[Tensor] = (),
) -> tuple[Any, ...]:
    """(scores, penalty) with one backward for both if the critic allows it, else as they are.

    `entry` is the node of x, `scale` the factor by which the adjoints of the recorded graph are too large, `arguments`
    what graphs from outside end in, before the critic: tensors that nobody else has, so that they have no hooks.
    """
    if not recording.active or recording.hooked or scores.numel() != len(scores):
        return scores, penalty
    found = parameters_between(entry, scores, recording, arguments)
    if found is None or not found[0]:
        return scores, penalty
    weights, others = found
    parameters = (*weights, *others)
    # edges, since a view's own moves when its base is changed in place
    edges = tuple(get_gradient_edge(p) for p in parameters)
    graph = _Graph((scores, penalty), edges, others, recording, scale)
    return _Shared.apply(graph, *parameters)


@dataclass
class _Graph:
    """The recorded graph behind a pair of scores and penalty; the backward drops it as autograd drops its own.

    `inputs` are the edges of the parameters, those of `others` last: the ones before belong to rows, which know what to
    do with seeds.
    """

    outputs: tuple[Tensor, Tensor] | None
    inputs: tuple[GradientEdge, ...]
    others: list[Tensor]
    recording: Recording
    scale: Tensor | None
    differentiated: bool = False  # by a backward with create_graph=True


class _Shared(torch.autograd.Function):
    """(scores, penalty) as functions of the critic's parameters. Highest gradient order: any."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.graph = graph
        assert graph.outputs is not None
        scores, penalty = graph.outputs
        return scores.detach(), penalty.detach()

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor | None, grad_penalty: Tensor | None) -> tuple[Any, ...]:
        graph = ctx.graph
        inputs, others = graph.inputs, graph.others
        if graph.outputs is None:
            raise RuntimeError("Trying to backward through scores and penalty a second time: wanted retain_graph=True")
        scores, penalty = graph.outputs
        create_graph = torch.is_grad_enabled()
        graph.differentiated |= create_graph
        retained = create_graph or _keeps_graph()
        keep = retained or graph.differentiated  # then the running backward itself goes through this graph, after us
        if not retained:
            graph.outputs, graph.inputs, graph.others = None, (), []
        with _without_hooks(others):
            if grad_scores is None or grad_penalty is None or create_graph:
                pairs = [(y, g) for y, g in ((scores, grad_scores), (penalty, grad_penalty)) if g is not None]
                grads = _gradients(pairs, inputs, keep, create_graph)
            else:
                grads = _with_seeds(graph, scores, grad_scores, penalty, grad_penalty, inputs, len(others), keep)
        return None, *grads


@contextmanager
def _without_hooks(leaves: list[Tensor]) -> Iterator[None]:
    """Takes the leaves' hooks off for the torch.autograd.grad inside a backward: that backward itself runs them."""
    kept = [(leaf, leaf._backward_hooks) for leaf in leaves if leaf._backward_hooks]
    for leaf, _ in kept:
        leaf._backward_hooks = None
    try:
        yield
    finally:
        for leaf, hooks in kept:
            leaf._backward_hooks = hooks


def _with_seeds(
    graph: _Graph,
    scores: Tensor,
    grad_scores: Tensor,
    penalty: Tensor,
    grad_penalty: Tensor,
    inputs: tuple[GradientEdge, ...],
    others: int,
    keep: bool,
) -> list[Tensor | None]:
    count = len(inputs) - others
    from_scores = _gradients([(scores, grad_scores)], inputs[count:], True) if others else []
    recording, seeds = graph.recording, grad_scores.reshape(-1)
    recording.seeds = seeds if graph.scale is None else seeds.to(graph.scale.dtype) / graph.scale
    recording.weights_wanted = True
    try:
        # what feeds the other parameters in may be shared with the world outside this graph
        grads = _gradients([(penalty, grad_penalty)], inputs, keep or others > 0)
    finally:
        recording.seeds, recording.weights_wanted = None, False
    for i, grad in enumerate(from_scores, start=count):
        before = grads[i]
        grads[i] = grad if before is None else before if grad is None else before + grad
    return grads


def _gradients(
    pairs: list[tuple[Tensor, Tensor]], inputs: tuple[GradientEdge, ...], keep: bool, create_graph: bool = False
) -> list[Tensor | None]:
    if not pairs:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, inputs, grads, retain_graph=keep, create_graph=create_graph, allow_unused=True)
    return list(found)


def parameters_between(
    entry: Any, scores: Tensor, recording: Recording, arguments: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[Tensor]] | None:
    """The weights and biases of the rows between x and the scores, and the leaves and arguments that enter between them
    otherwise; None where the reasoning above does not hold."""
    batch = len(scores)
    depends: dict[Any, bool] = {entry: True}
    weights: dict[int, Tensor] = {}
    of_others: list[Any] = []
    for node in _inputs_first([scores.grad_fn], entry):
        edges = [n for n, _ in node.next_functions if n is not None]
        on_path = [depends[n] for n in edges]
        depends[node] = any(on_path)
        if not depends[node]:
            continue
        if not node._input_metadata or tuple(node._input_metadata[0].shape[:1]) != (batch,):
            return None
        kind: Any = type(node)
        if kind is Apply._backward_cls:
            if node.recording is not recording or not depends[node.next_functions[0][0]] or sum(on_path) != 1:
                return None
            _, w = node.saved_tensors
            weights.update({id(p): p for p in (w, node.bias) if p is not None and p.requires_grad})
        elif kind not in (Activate._backward_cls, Pool._backward_cls):
            rule = _LINEAR.get(node.name())
            if rule is None or not rule(node, on_path):
                return None
            of_others += [edge for edge in node.next_functions if edge[0] is not None and not depends[edge[0]]]
    if not depends[scores.grad_fn]:
        return None
    last: Any = scores.grad_fn
    others = _entering(of_others, arguments, range(recording.first, last._sequence_nr() + 1))
    if others is None:
        return None
    found = [get_gradient_edge(p).node for p in (*weights.values(), *others)]
    behind = _inputs_first([n for node in found for n, _ in node.next_functions if n is not None], entry)
    if set(found) & set(behind):  # whose gradient would contain, and be added to, that of another
        return None
    return list(weights.values()), others


def _entering(edges: list[Any], arguments: Sequence[Tensor], inside: range) -> list[Tensor] | None:
    """The leaves and arguments that the graph behind `edges` begins with; None if it has parts from outside the critic
    besides, whose nodes' numbers are not `inside`, or Functions of others, whose backward need not be linear."""
    ends = {tuple(get_gradient_edge(t)[:2]): t for t in arguments}
    found: dict[int, Tensor] = {}
    seen = set()
    stack = list(edges)
    while stack:
        edge = stack.pop()
        node = edge[0]
        if node is None or edge in seen:
            continue
        seen.add(edge)
        end = ends.get(edge, getattr(node, "variable", None))
        if end is not None:
            found[id(end)] = end
        elif node._sequence_nr() not in inside or _of_others(node):
            return None
        else:
            stack += node.next_functions
    return list(found.values())


def _of_others(node: Any) -> bool:
    """Whether the node is that of an autograd Function from outside this package."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and not function.__module__.startswith("gpkernels.")


def _inputs_first(roots: list[Any], entry: Any) -> list[Any]:
    """The nodes of the graph of `roots`, but for `entry` and what lies behind it, each after all its inputs."""
    order: list[Any] = []
    seen = {entry}
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    return order


def _keeps_batch(node: Any, on_path: list[bool]) -> bool:
    """None of the dimensions that the node reduces, moves or indexes is the first."""
    if hasattr(node, "_saved_dims"):
        rank = len(node._saved_dims)
        return _dimension(node._saved_dims[0], rank) == 0
    sizes = getattr(node, "_saved_self_sym_sizes", node._input_metadata[0].shape)
    dims: list[int] = []
    for name in ("_saved_dim", "_saved_dim0", "_saved_dim1"):
        value = getattr(node, name, ())
        dims += [value] if isinstance(value, int) else list(value or ())
    return bool(dims) and all(_dimension(d, len(sizes)) != 0 for d in dims)


def _dimension(dim: int, rank: int) -> int:
    if dim >= 2**63:  # a negative dimension, saved as an unsigned number
        dim -= 2**64
    return dim + rank if dim < 0 else dim


def _anything(node: Any, on_path: list[bool]) -> bool:
    return True


def _aligned(node: Any, on_path: list[bool]) -> bool:
    """The inputs on the path have the rank of the result, so that their batches meet sample by sample."""
    edges = [n for n, _ in node.next_functions if n is not None]
    rank = len(node._input_metadata[0].shape)
    return all(len(n._input_metadata[0].shape) == rank for n, on in zip(edges, on_path, strict=True) if on)


def _one_factor(node: Any, on_path: list[bool]) -> bool:
    """A product in which x is one factor only."""
    return sum(on_path) == 1 and _aligned(node, on_path)


def _numerator(node: Any, on_path: list[bool]) -> bool:
    return on_path[0] and node.next_functions[0][0] is not None and _one_factor(node, on_path)


def _pads_a_sample(node: Any, on_path: list[bool]) -> bool:
    return len(node._saved_pad) // 2 < len(node._input_metadata[0].shape)


_LINEAR: dict[str, Callable[[Any, list[bool]], bool]] = {
    **dict.fromkeys(
        (
            "ViewBackward0",
            "UnsafeViewBackward0",
            "ReshapeAliasBackward0",
            "AliasBackward0",
            "CloneBackward0",
            "ToCopyBackward0",
            "SqueezeBackward0",
            "NegBackward0",
            "ReflectionPad1DBackward0",
            "ReflectionPad2DBackward0",
            "ReplicationPad2DBackward0",
            "UpsampleNearest1DBackward0",
            "UpsampleNearest2DBackward0",
            "UpsampleNearest3DBackward0",
            "UpsampleLinear1DBackward0",
            "UpsampleBilinear2DBackward0",
            "UpsampleTrilinear3DBackward0",
            "UpsampleBicubic2DBackward0",
            "NativeDropoutBackward0",
        ),
        _anything,
    ),
    **dict.fromkeys(
        (
            "SqueezeBackward1",
            "UnsqueezeBackward0",
            "MeanBackward1",
            "SumBackward1",
            "CatBackward0",
            "SelectBackward0",
            "SliceBackward0",
            "TransposeBackward0",
            "PermuteBackward0",
        ),
        _keeps_batch,
    ),
    **dict.fromkeys(("AddBackward0", "SubBackward0", "WhereBackward0"), _aligned),
    "ConstantPadNdBackward0": _pads_a_sample,
    "MulBackward0": _one_factor,
    "DivBackward0": _numerator,
}
"""Nodes of torch that are (piecewise) linear in x, sample by sample, each with what else must hold."""
