"""Whole steps of critics, as problems: what is minimised, and the variants that compute its gradient.

`STEPS[name](critic, real, fake)` is a `Problem`. Its objective says once what "best" minimises and every other way to
differentiate (`benchmarks.peers`) with it; "usual" and "gpkernels" are written as their users write them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import gpkernels as gp

Step = Callable[[], None]
Loss = Callable[[Any, Any], Any]
"""Of the scores of real and of fake images."""


def two_sided(grad: Tensor) -> Tensor:
    return 10 * (grad.flatten(1).norm(2, dim=1) - 1).square().mean()


def linear(grad: Tensor) -> Tensor:
    return 10 * grad.flatten(1).norm(2, dim=1).mean()


def half_square(grad: Tensor) -> Tensor:
    return 10 * 0.5 * grad.flatten(1).square().sum(1).mean()


def hinge(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """LS-GAN's, on pairs with a margin of 1."""
    return (1 + real_scores - fake_scores).relu().mean()


def non_saturating(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return softplus(-real_scores).mean() + softplus(fake_scores).mean()


def wasserstein(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return fake_scores.mean() - real_scores.mean()


class Objective(NamedTuple):
    """What a step minimises, for any library's arrays: a loss, where there is one, and a penalty."""

    penalty: Callable[[Any], Any]
    loss: Loss | None = None

    def __call__(
        self,
        scores: Callable[[Any], Any],
        scores_and_grad: Callable[[Any], tuple[Any, Any]],
        real: Any,
        fake: Any = None,
        points: Any = None,
    ) -> Any:
        """In as few forwards as there can be: without `points` the penalty is at the real images and shares theirs."""
        if self.loss is None:
            return self.penalty(scores_and_grad(real)[1])
        if points is None:
            real_scores, grad = scores_and_grad(real)
        else:
            real_scores, grad = scores(real), scores_and_grad(points)[1]
        return self.loss(real_scores, scores(fake)) + self.penalty(grad)


class Problem(NamedTuple):
    """What the variants share, and the variants; `inputs` are those of the objective, made anew in every step."""

    critic: nn.Module
    real: Tensor
    fake: Tensor
    objective: Objective
    inputs: Callable[[], tuple[Tensor, ...]]
    variants: dict[str, Step]


def problem(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    objective: Objective,
    inputs: Callable[[], tuple[Tensor, ...]],
    usual: Step,
    ours: Step,
) -> Problem:
    loss, variants = objective.loss, {}
    if loss is not None:
        variants["no penalty"] = lambda: loss(critic(real), critic(fake)).backward()

    def best() -> None:
        assign(critic, objective(critic, lambda x: at(critic, x), *inputs()))

    variants |= {"usual": usual, "best": best, "gpkernels": ours}
    return Problem(critic, real, fake, objective, inputs, variants)


def at(critic: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and their gradient in x, as everybody writes it."""
    x = x.detach().requires_grad_()
    scores = critic(x)
    return scores, torch.autograd.grad(scores.sum(), x, create_graph=True)[0]


def assign(critic: nn.Module, loss: Tensor) -> None:
    parameters = list(critic.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.grad = grad


def penalty_step(critic: nn.Module, real: Tensor, fake: Tensor) -> Problem:
    def usual() -> None:
        two_sided(at(critic, real)[1]).backward()

    def ours() -> None:
        gp.gradient_penalty(critic, real, kind="r1", form="two_sided").backward()

    return problem(critic, real, fake, Objective(two_sided), lambda: (real,), usual, ours)


def step_at_real(loss: Loss, penalty: Callable[[Tensor], Tensor], kind: str) -> Callable[..., Problem]:
    """A critic's step with a penalty at the real images themselves, which can share their forward."""

    def make(critic: nn.Module, real: Tensor, fake: Tensor) -> Problem:
        def usual() -> None:
            total = loss(critic(real), critic(fake))
            (total + penalty(at(critic, real)[1])).backward()

        def ours() -> None:
            scores, value = gp.score_and_penalty(critic, real, kind=kind)
            (loss(scores, critic(fake)) + value).backward()

        return problem(critic, real, fake, Objective(penalty, loss), lambda: (real, fake), usual, ours)

    return make


def step_around(loss: Loss, points: Callable[[Tensor, Tensor], Points]) -> Callable[..., Problem]:
    """A critic's step with the two-sided penalty at points of their own."""

    def make(critic: nn.Module, real: Tensor, fake: Tensor) -> Problem:
        usual_points, best_points, our_penalty = points(real, fake)

        def usual() -> None:
            total = loss(critic(real), critic(fake))
            (total + two_sided(at(critic, usual_points())[1])).backward()

        def ours() -> None:
            (loss(critic(real), critic(fake)) + our_penalty(critic)).backward()

        objective = Objective(two_sided, loss)
        return problem(critic, real, fake, objective, lambda: (real, fake, best_points()), usual, ours)

    return make


class Points(NamedTuple):
    """Where a penalty is taken, by the usual code and by the best, and our penalty there."""

    usual: Callable[[], Tensor]
    best: Callable[[], Tensor]
    penalty: Callable[[nn.Module], Tensor]


def between(real: Tensor, fake: Tensor) -> Points:
    """WGAN-GP's, with weights that are the same for all."""
    eps = torch.rand(len(real), device=real.device)
    column = eps.view(-1, *[1] * (real.dim() - 1))
    return Points(
        lambda: column * real + (1 - column) * fake,
        lambda: torch.lerp(fake, real, column),
        lambda critic: gp.gradient_penalty(critic, real, fake, eps=eps),
    )


def near(real: Tensor, fake: Tensor) -> Points:
    """DRAGAN's, with noise that is the same for all: kind "local" would draw its own."""
    noise = torch.rand_like(real) * 2 - 1

    def point() -> Tensor:
        return real + 0.5 * real.std() * noise

    return Points(point, point, lambda critic: gp.gradient_penalty(critic, point(), kind="r1", form="two_sided"))


STEPS = {
    "penalty step": penalty_step,
    "LS-GAN-PG step": step_at_real(hinge, linear, "ls_gan_pg"),
    "WGAN-GP step": step_around(wasserstein, between),
    "R1 step": step_at_real(non_saturating, half_square, "r1"),
    "DRAGAN step": step_around(non_saturating, near),
}
