"""The optimizers of a config, and the historic clipping of weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gpkernels.training.config import TrainConfig
from gpkernels.training.objective import Penalties


def make_optimizer(config: TrainConfig, net: str, parameters: Iterable[Tensor], penalties: Penalties) -> Any:
    """Of the "generator" or the "critic"; the critic's Adam is corrected for a lazy penalty."""
    lr = config.lr if net == "generator" or config.critic_lr is None else config.critic_lr
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, capturable=config.cuda_graph)
    settings: dict[str, Any] = {"lr": lr, "betas": (config.beta1, config.beta2)}
    if net == "critic" and len(penalties.each):
        settings = penalties.each[0].lazy_adam(**settings)
    return torch.optim.Adam(parameters, fused=True, capturable=config.cuda_graph, **settings)


@torch.no_grad()
def clip_weights(parameters: Iterable[Tensor], limit: float) -> None:
    """Every element to [-limit, limit] (Arjovsky et al. 2017, Algorithm 1)."""
    parameters = list(parameters)
    torch._foreach_clamp_min_(parameters, -limit)
    torch._foreach_clamp_max_(parameters, limit)
