"""Everything random of a step, as functions of (seed, step) alone.

What is random is drawn for the whole batch and cut, so that the parts of several processes, put together, are the
batch of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import gpkernels as gp
from gpkernels.kinds import DRAGAN_SCALE
from gpkernels.training import models
from gpkernels.training.config import TrainConfig

if TYPE_CHECKING:
    from gpkernels.training.processes import Processes


def generator_of(config: TrainConfig, step: int) -> torch.Generator:
    """The random numbers of a step."""
    return torch.Generator().manual_seed((config.seed << 32) + step + 1)


def latents(config: TrainConfig, draws: torch.Generator, processes: Processes) -> Tensor:
    """z of this process's part of a batch, (part, nz), on its device."""
    whole = models.draw_z(config, config.batch_size, draws)
    return whole[processes.shard.of(config.batch_size)].to(processes.device)


def _weights(config: TrainConfig, real: Tensor, draws: torch.Generator, processes: Processes) -> Tensor:
    """U[0, 1) a sample, (part,)."""
    whole = torch.rand(config.batch_size, generator=draws)
    return whole[processes.shard.of(config.batch_size)].to(real.device, real.dtype)


def _noise(config: TrainConfig, real: Tensor, draws: torch.Generator, processes: Processes) -> Tensor:
    """U[-1, 1) an element times the scale, in standard deviations of the whole batch's elements; of real's shape."""
    scale = DRAGAN_SCALE if config.penalty_scale is None else config.penalty_scale
    whole = real.new_zeros(config.batch_size, *real.shape[1:])
    noise = gp.perturb(whole, scale=scale, noise="uniform", generator=draws)[processes.shard.of(config.batch_size)]
    variances, means = processes.gather(torch.stack(torch.var_mean(real, correction=0))[None]).unbind(1)
    return noise * (variances.mean() + means.var(correction=0)).sqrt()


class Around(NamedTuple):
    """A kind of penalty at points other than the samples: what `draw(config, real, draws, processes)` gives for this
    process's real images can be cut further along its first dimension; `point(real, fake, drawn)` are the points."""

    draw: Callable[[TrainConfig, Tensor, torch.Generator, Processes], Tensor]
    point: Callable[[Tensor, Tensor, Tensor], Tensor]


AROUND = {
    "coupled": Around(_weights, lambda real, fake, drawn: gp.interpolate(real, fake, eps=drawn)),
    "local": Around(_noise, lambda real, fake, drawn: real + drawn),
}
"""The kinds of `gpkernels.kinds` that are not at the samples themselves."""
