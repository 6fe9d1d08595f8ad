"""What the nets minimise: a config's adversarial loss and gradient penalties, in one form for all losses."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import gpkernels as gp
from gpkernels.kinds import KINDS
from gpkernels.losses.framework import Loss
from gpkernels.losses.sensitive import FAMILY, LossSensitive
from gpkernels.losses.table import loss as table_loss
from gpkernels.training.config import TrainConfig
from gpkernels.training.models.norms import still_statistics


class Batch(NamedTuple):
    """What a step trains on: real images, their labels as arguments of the nets ((y,) or ()), and weights or None."""

    real: Tensor
    y: tuple[Tensor, ...] = ()
    weights: Tensor | None = None


class CriticLoss(NamedTuple):
    """The critic's loss, and what a log says of it: detached scalars by name."""

    loss: Tensor
    terms: dict[str, Tensor]


class Objective(Protocol):
    needs_real: bool
    """Whether the generator's loss compares with the scores of real images."""

    def critic(self, real_scores: Tensor, fake_scores: Tensor, batch: Batch, fake: Tensor) -> CriticLoss: ...

    def generator(self, fake_scores: Tensor, real_scores: Tensor | None) -> Tensor: ...


def _terms(real: Tensor, fake: Tensor, low_is_real: bool, **more: Tensor) -> dict[str, Tensor]:
    """Mean scores, and by how much the critic tells real from fake."""
    gap = fake - real if low_is_real else real - fake
    return {"score_real": real, "score_fake": fake, "gap": gap, **more}


class Framework:
    """A loss of three functions of the score."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.needs_real = loss, loss.needs_real

    def critic(self, real_scores: Tensor, fake_scores: Tensor, batch: Batch, fake: Tensor) -> CriticLoss:
        real, generated = (scores.detach().float().mean() for scores in (real_scores, fake_scores))
        return CriticLoss(self.loss.critic(real_scores, fake_scores), _terms(real, generated, self.loss.low_is_real))

    def generator(self, fake_scores: Tensor, real_scores: Tensor | None) -> Tensor:
        return self.loss.generator(fake_scores, real_scores)


class Sensitive:
    """A loss-sensitive one: scores are losses, compared in pairs whose images give a margin."""

    needs_real = False

    def __init__(self, loss: LossSensitive) -> None:
        self.loss = loss

    def critic(self, real_scores: Tensor, fake_scores: Tensor, batch: Batch, fake: Tensor) -> CriticLoss:
        found = self.loss.terms(real_scores, fake_scores, batch.real, fake, batch.weights)
        return CriticLoss(found.loss, _terms(found.real, found.fake, True, margin=found.margin))

    def generator(self, fake_scores: Tensor, real_scores: Tensor | None) -> Tensor:
        return self.loss.generator(fake_scores)


def make_objective(config: TrainConfig) -> Objective:
    if config.loss in FAMILY:
        return Sensitive(LossSensitive(slope=config.slope, margin=config.margin, gamma=config.gamma))
    return Framework(table_loss(config.loss, epsilon=config.epsilon))


PENALTY_AXES = {"ls_gan_pg": "pixel"}
"""What the norm of a kind runs over, if not a sample, where a config leaves it open."""


class Penalties:
    """The gradient penalties of a config: none, one, or R1 and R2 together, whose weights are the same."""

    def __init__(self, config: TrainConfig) -> None:
        kinds = () if config.penalty == "none" else config.penalty.split("+")
        self.each = tuple(
            gp.GradientPenalty(
                kind,
                weight=config.penalty_weight,
                form=config.penalty_form,
                target=config.penalty_target,
                norm=config.penalty_norm,
                axes=config.penalty_axes or PENALTY_AXES.get(kind, "sample"),
                norm_eps=config.penalty_norm_eps,
                noise=config.penalty_noise,
                scale=config.penalty_scale,
                per_element=config.penalty_per_element,
                interval=config.penalty_interval,
            )
            for kind in kinds
        )

    def state_dict(self) -> list[dict[str, Any]]:
        return [penalty.state_dict() for penalty in self.each]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for penalty, state in zip(self.each, states, strict=True):
            penalty.load_state_dict(state)

    def __call__(
        self, critic: torch.nn.Module, batch: Batch, fake: Tensor, draws: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The critic's scores of real and fake images, and the sum of the penalties.

        A penalty at the images themselves shares their forward. Running statistics of the critic are those of real
        images, since it is they that it sees in eval mode.
        """
        images, scores = {"real": batch.real, "fake": fake}, {}
        total = torch.zeros((), device=batch.real.device)
        for penalty in self.each:
            kind = KINDS[penalty.kind]
            if kind.at_samples:
                (side,) = kind.inputs
                with _statistics_of(side, critic):
                    scores[side], value = penalty.score_and_penalty(critic, images[side], critic_args=batch.y)
            else:
                with still_statistics(critic):
                    value = penalty(critic, batch.real, fake, generator=draws, critic_args=batch.y)
            total = total + value
        for side in ("real", "fake"):
            if side not in scores:
                with _statistics_of(side, critic):
                    scores[side] = critic(images[side], *batch.y)
        return scores["real"], scores["fake"], total


def _statistics_of(side: str, critic: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if side == "real" else still_statistics(critic)
