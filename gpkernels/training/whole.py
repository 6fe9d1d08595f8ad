"""Losses in which samples meet, such as the relativistic average ones, when a batch is computed in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpkernels.training.data import Shard


def of_the_whole(
    loss: Callable[..., Tensor], parts: Sequence[Tensor | None], wholes: Sequence[Tensor | None], shard: Shard
) -> Tensor:
    """loss(*wholes), shape (), as a function of `parts`, the shard's part of each of `wholes`.

    The mean over all shards of its gradient is the gradient of the loss of the whole: each score is weighed by the
    loss's derivative in it, times the number of shards. Scores have shape (B, ...); None stands for scores that the
    loss does not take. Highest gradient order: 1.
    """
    with torch.enable_grad():
        leaves = [None if whole is None else whole.detach().requires_grad_() for whole in wholes]
        value = loss(*leaves)
        taken = [
            (part, leaf) for part, leaf in zip(parts, leaves, strict=True) if part is not None and leaf is not None
        ]
        grads = torch.autograd.grad(value, [leaf for _, leaf in taken], allow_unused=True)
    total = value.detach()
    for (part, _), grad in zip(taken, grads, strict=True):
        if grad is not None:
            seed = grad[shard.of(len(grad))] * shard.count
            total = total + ((part - part.detach()) * seed).sum()  # 0, whose gradient is the seed
    return total
