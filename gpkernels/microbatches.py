"""A penalty in bounded memory: one microbatch's graph at a time, parameter gradients kept instead of graphs.

The penalty is a sum over samples, so its parameter gradients are sums too. Each microbatch is differentiated as
soon as it is computed; the leaves that its graph reaches are found by walking it, so closures and functional
critics work as modules do. The result is one scalar whose backward adds the kept gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpkernels._checks import check_count, fail

if TYPE_CHECKING:
    from gpkernels.penalty import Measure, _Call


def penalty(call: _Call, x: Tensor, measure: Measure, size: int, create_graph: bool) -> Tensor:
    """measure of the critic's gradient at x, `size` samples at a time."""
    _check_independent(call)
    groups = x.numel() // x.shape[1] if measure.axes == "pixel" else x.shape[0]
    value: Tensor | None = None
    kept: dict[Tensor, Tensor] = {}
    for part, part_call in _parts(call, x, size):
        share = measure(part_call.differentiate(part, create_graph).grad, reduction="sum") / groups
        value = share.detach() if value is None else value + share.detach()
        if create_graph:
            leaves = _leaves(share)
            factor = call.loss_scale(share.device)
            # retain_graph: graphs that feed the critic from outside are shared between microbatches
            grads = torch.autograd.grad(share, leaves, factor, retain_graph=True) if leaves else ()
            for leaf, leaf_grad in zip(leaves, grads, strict=True):
                if factor is not None:
                    leaf_grad = leaf_grad / factor
                kept[leaf] = kept[leaf] + leaf_grad if leaf in kept else leaf_grad
    assert value is not None
    return _WithGradients.apply(value, tuple(kept.values()), *kept) if kept else value


def checkpointed_scores(call: _Call, x: Tensor, size: int) -> Tensor:
    """The critic's scores, a microbatch at a time, recomputed in the backward instead of kept."""
    check_count("microbatch", size)
    _check_independent(call)
    return torch.cat(
        [checkpoint(part_call.scores, part, use_reentrant=False) for part, part_call in _parts(call, x, size)]
    )


class _WithGradients(torch.autograd.Function):
    """`value`, whose gradients in `leaves` are known. Highest gradient order: 1; beyond it, an error."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        ctx.grads = grads
        ctx.save_for_backward(*leaves)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        leaves = ctx.saved_tensors
        return None, None, *(_Once.apply(grad_out * grad, *leaves) for grad in ctx.grads)


class _Once(torch.autograd.Function):
    """The identity on `grad`; differentiating it raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *leaves: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "gradient_penalty(microbatch=...) keeps first derivatives only: leave microbatch out to differentiate twice"
        )


def _parts(call: _Call, x: Tensor, size: int) -> Iterator[tuple[Tensor, _Call]]:
    """Microbatches of x, each with the critic's batched arguments split alongside."""
    from gpkernels.penalty import _Call

    batch = x.shape[0]
    for start in range(0, batch, size):
        rows = slice(start, min(start + size, batch))

        def split(argument: Any, rows: slice = rows) -> Any:
            batched = isinstance(argument, Tensor) and argument.dim() > 0 and argument.shape[0] == batch
            return argument[rows] if batched else argument

        args = tuple(split(a) for a in call.args)
        kwargs = {name: split(a) for name, a in call.kwargs.items()}
        yield x[rows], _Call(call.critic, args, kwargs, call.scaler)


def _leaves(output: Tensor) -> list[Tensor]:
    """The leaf tensors that require grad and that `output` depends on, but for the critic's x."""
    found: dict[Tensor, None] = {}
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or getattr(node, "closed", False):
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[node.variable] = None
        stack.extend(parent for parent, _ in node.next_functions)
    return list(found)


def _check_independent(call: _Call) -> None:
    if not isinstance(call.critic, nn.Module):
        return
    for name, module in call.critic.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise fail(
                "microbatch",
                "None for a critic that mixes samples",
                f"a critic whose {name or 'root'} is {type(module).__name__} in training mode",
            )
