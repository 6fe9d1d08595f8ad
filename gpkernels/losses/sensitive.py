"""The loss-sensitive family (Qi 2020, "Loss-sensitive generative adversarial networks on Lipschitz densities", IJCV).

The critic's output L is a loss: low on real images. With the margin Delta(x, G(z)) = lambda ||x - G(z)||_1, summed
over the image and constant in the backward, and a = Delta + L(x) - L(G(z)) for pairs by batch index:

    critic     mean C(a) + gamma mean L(x),   C(a) = max(a, nu a)     (eq. 4 for nu = 0; GLS-GAN, eq. 16)
    generator  mean L(G(z))                                            (eq. 5)

CLS-GAN is the same with L(x, y) = `class_loss` and images generated for the labels y of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gpkernels._checks import check_floating, check_number, check_same, fail
from gpkernels.functional import pairwise_cost
from gpkernels.ops._layout import accumulation_dtype

FAMILY = {
    "ls-gan": "C(a) = max(0, a) (Qi 2020, eq. 4)",
    "gls-gan": "C(a) = max(a, slope a), slope <= 1; slope 1 is wasserstein, -1 is |a| (Qi 2020, eq. 16)",
    "cls-gan": "ls-gan with L(x, y) = -log softmax(logits)_y (Qi 2020, the conditional LS-GAN)",
}
"""The members, and what each makes of a = margin ||x - G(z)||_1 + L(x) - L(G(z))."""


@dataclass(frozen=True)
class CriticTerms:
    """The critic's loss and what it is made of; all scalars, those but `loss` without gradient."""

    loss: Tensor
    margin: Tensor
    real: Tensor
    fake: Tensor


@dataclass(frozen=True)
class LossSensitive:
    """LS-GAN (slope 0), GLS-GAN (slope nu <= 1); `margin` is lambda, `gamma` weighs the real samples' own loss.

    Losses have shape (B,) or (B, 1, ...), images any shape (B, ...), both of any floating dtype; sums and results are
    float32 (float64 for float64). C'(0) = 1. Differentiable in the losses to any order; the images get no gradient.
    """

    slope: float = 0.0
    margin: float = 2e-4
    gamma: float = 0.0
    low_is_real: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("margin", self.margin, minimum=0)
        check_number("gamma", self.gamma, minimum=0)
        if check_number("slope", self.slope) > 1:
            raise fail("slope", "a number <= 1", self.slope)

    def critic(
        self, real_losses: Tensor, fake_losses: Tensor, real: Tensor, fake: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """The critic's loss, a scalar; see `terms`."""
        return self.terms(real_losses, fake_losses, real, fake, weights).loss

    def terms(
        self, real_losses: Tensor, fake_losses: Tensor, real: Tensor, fake: Tensor, weights: Tensor | None = None
    ) -> CriticTerms:
        """mean w (C(a) + gamma L(x)) and its parts, from the losses of `real` and `fake` and the images themselves.

        `weights` w, shape (B,), weighs pairs (see `presume_labels`); all 1 if None. Raises ValueError or TypeError for
        shapes, dtypes or devices that do not fit.
        """
        check_floating("real", real)
        check_same("fake", fake, "real", real)
        real_losses = _one_a_sample("real_losses", real_losses, len(real))
        fake_losses = _one_a_sample("fake_losses", fake_losses, len(real))
        value, delta = pairwise_cost(real, fake, real_losses, fake_losses, margin=self.margin, slope=self.slope)
        if self.gamma:
            value = value + self.gamma * real_losses
        if weights is not None:
            value = value * _one_a_sample("weights", weights, len(real))
        return CriticTerms(value.mean(), delta.mean(), real_losses.detach().mean(), fake_losses.detach().mean())

    def generator(self, fake_losses: Tensor) -> Tensor:
        """mean L(G(z)), a scalar."""
        check_floating("fake_losses", fake_losses)
        return _one_a_sample("fake_losses", fake_losses, len(fake_losses)).mean()


def _one_a_sample(name: str, losses: Tensor, count: int) -> Tensor:
    check_floating(name, losses)
    if losses.shape[0] != count or losses.numel() != count:
        raise fail(name, f"one loss a sample, shape ({count},) or ({count}, 1, ...)", tuple(losses.shape))
    return losses.reshape(count).to(accumulation_dtype(losses.dtype))


def class_loss(logits: Tensor, y: Tensor) -> Tensor:
    """CLS-GAN's L(x, y) = -log softmax(logits)_y, shape (B,): low where the critic finds x a likely image of class y.

    `logits` (B, K), any floating dtype, of any size (+-1e4 does not overflow); `y` (B,) int64 in [0, K). Computed in
    float32 (float64 for float64), differentiable to any order. Raises ValueError or TypeError for what does not fit;
    on CUDA a label out of range is torch's device-side assertion.
    """
    logits, y = _check_classes(logits, y)
    return -logits.log_softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)


def presume_labels(
    logits: Tensor, y: Tensor, known: Tensor, *, weight: float = 1.0, confidence: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The semi-supervised rule of CLS-GAN: (labels, weights), each of shape (B,).

    Where `known` (B,) bool is False, `y` is replaced by the label of the least loss, argmin_y L(x, y) = argmax logits,
    in both L(x, y) and L(G(z, y), y), and the pair counts with `weight` instead of 1. No gradient. [memory] The rule is
    as remembered from Qi 2020; the paper was not at hand. There the objective is a sum of two expectations, over images
    with and without a label; the mean over a batch of both is that sum up to a factor if half of the batch is known,
    as the trainer has it. If a share s is, `weight` stands for weight (1 - s) / s.

    `confidence` is not in the rule: a pair whose presumed label has a probability exp(-L(x, y)) below it counts with 0.
    Without it a critic that guesses badly at first learns its own guesses.
    """
    if known.dtype != torch.bool or known.shape != y.shape:
        raise fail("known", f"booleans of shape {tuple(y.shape)}", f"{known.dtype} of shape {tuple(known.shape)}")
    logits, y = _check_classes(logits, torch.where(known, y, 0))
    weight = check_number("weight", weight, minimum=0)
    if check_number("confidence", confidence, minimum=0) > 1:
        raise fail("confidence", "a probability", confidence)
    probability, guess = logits.detach().softmax(1).max(1)
    return torch.where(known, y, guess), torch.where(known, 1.0, weight * (probability >= confidence))


def _check_classes(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise fail("logits", "shape (B, classes)", tuple(logits.shape))
    if y.dtype != torch.int64 or y.shape != logits.shape[:1]:
        raise fail("y", f"int64 labels of shape ({len(logits)},)", f"{y.dtype} of shape {tuple(y.shape)}")
    if y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise fail("y", f"labels from 0 to {logits.shape[1] - 1}", y.tolist())
    return logits.to(accumulation_dtype(logits.dtype)), y
