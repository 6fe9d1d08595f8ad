"""The loss-sensitive family (Qi 2020, "Loss-sensitive generative adversarial networks", IJCV).

The critic's output L is a loss: low on real images. With the margin Delta(x, G(z)) = lambda ||x - G(z)||_1, summed
over the image and constant in the backward, and a = Delta + L(x) - L(G(z)) for pairs by batch index:

    critic     mean C(a) + gamma mean L(x),   C(a) = max(a, nu a)     (eq. 4 for nu = 0; GLS-GAN, eq. 16)
    generator  mean L(G(z))                                            (eq. 5)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CriticTerms:
    """The critic's loss and what it is made of; all scalars."""

    loss: Tensor
    margin: Tensor
    real: Tensor
    fake: Tensor


def margins(real: Tensor, fake: Tensor, weight: float) -> Tensor:
    """lambda ||x - G(z)||_1 per pair, without gradient. Shape (B,)."""
    with torch.no_grad():
        return weight * (real - fake).abs().flatten(1).sum(1)


def cost(a: Tensor, slope: float) -> Tensor:
    """C(a) = max(a, slope a), for slope <= 1."""
    return torch.maximum(a, slope * a)


def critic_terms(
    loss_real: Tensor, loss_fake: Tensor, margin: Tensor, *, slope: float = 0.0, gamma: float = 0.0
) -> CriticTerms:
    """The critic's loss from its outputs on real and generated images and their margins, each of shape (B,)."""
    loss = cost(margin + loss_real - loss_fake, slope).mean()
    if gamma:
        loss = loss + gamma * loss_real.mean()
    return CriticTerms(loss, margin.mean(), loss_real.detach().mean(), loss_fake.detach().mean())


def generator_loss(loss_fake: Tensor) -> Tensor:
    return loss_fake.mean()
