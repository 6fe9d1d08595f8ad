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


_APART = 0x9E3779B1  # 2**32 over the golden ratio: multiples of it keep away from each other


def generator_of(config: TrainConfig, step: int) -> torch.Generator:
    """The random numbers of a step, other ones for each seed below 1000 and each of a million steps."""
    return torch.Generator().manual_seed((config.seed * _APART + step + 1) % 2**32)  # of a seed torch uses 32 bits


def latents(config: TrainConfig, draws: torch.Generator, processes: Processes) -> Tensor:
    """z of this process's part of a batch, (part, nz), on its device."""
    whole = models.draw_z(config, config.batch_size, draws)
    return whole[processes.shard.of(config.batch_size)].to(processes.device)


def _weights(config: TrainConfig, real: Tensor, draws: torch.Generator, processes: Processes) -> Tensor:
    """U[0, 1) a sample, (part,), or an element, of real's shape."""
    shape = real.shape[1:] if config.penalty_per_element else ()
    whole = torch.rand(config.batch_size, *shape, generator=draws)
    return whole[processes.shard.of(config.batch_size)].to(real.device, real.dtype)


def _noise(config: TrainConfig, real: Tensor, draws: torch.Generator, processes: Processes) -> Tensor:
    """The scale times N(0, 1), or U[-1, 1) in standard deviations of the whole batch's elements; of real's shape."""
    scale, kind = config.penalty_scale, config.penalty_noise or "uniform"
    whole = real.new_zeros(config.batch_size, *real.shape[1:])
    whole = gp.perturb(whole, scale=DRAGAN_SCALE if scale is None else scale, noise=kind, generator=draws)
    noise = whole[processes.shard.of(config.batch_size)]
    if kind == "normal":
        return noise
    variances, means = processes.gather(torch.stack(torch.var_mean(real, correction=0))[None]).unbind(1)
    return noise * (variances.mean() + means.var(correction=0)).sqrt()


def _between(real: Tensor, fake: Tensor, weights: Tensor) -> Tensor:
    return gp.interpolate(real, fake, eps=weights) if weights.dim() == 1 else torch.lerp(fake, real, weights)


class Around(NamedTuple):
    """A kind of penalty at points other than the samples: what `draw(config, real, draws, processes)` gives for this
    process's real images can be cut further along its first dimension; `point(real, fake, drawn)` are the points."""

    draw: Callable[[TrainConfig, Tensor, torch.Generator, Processes], Tensor]
    point: Callable[[Tensor, Tensor, Tensor], Tensor]


AROUND = {
    "coupled": Around(_weights, _between),
    "local": Around(_noise, lambda real, fake, drawn: real + drawn),
}
"""The kinds of `gpkernels.kinds` that are not at the samples themselves."""
