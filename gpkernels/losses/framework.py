"""Adversarial losses as data: three functions of a score, and what the score is compared with.

    critic     max  E_real f(D(x)) + E_fake g(D(x))
    generator  min  E_fake h(D(x))

(Dong and Yang 2019, "Towards a deeper understanding of adversarial losses"). In a relativistic loss
(Jolicoeur-Martineau 2019, "The relativistic discriminator: a key element missing from standard GAN") a sample's score
is replaced by its difference from a score of the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpkernels._checks import check_choice, check_floating, check_number, fail
from gpkernels.losses.components import COMPONENTS, Component
from gpkernels.losses.expressions import parse
from gpkernels.ops._layout import accumulation_dtype


class _Relation(NamedTuple):
    """What f and g see of (real, fake) in the critic's loss, and what h sees in the generator's, each term a mean."""

    critic: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    generator: Callable[[Tensor, Tensor], tuple[Tensor, ...]]


RELATIONS = {
    "none": _Relation(lambda real, fake: (real, fake), lambda real, fake: (fake,)),
    "average": _Relation(
        lambda real, fake: (real - fake.mean(), fake - real.mean()),
        lambda real, fake: (fake - real.mean(), fake.mean() - real),
    ),
    "pair": _Relation(lambda real, fake: (real - fake, fake - real), lambda real, fake: (fake - real,)),
}
"""What a score is compared with: nothing, the other side's mean, or the other side's sample at the same index."""


@dataclass(frozen=True)
class Loss:
    """One adversarial loss; `critic` and `generator` are minimised.

    `epsilon` weighs f (imbalanced losses). `low_is_real` is for a critic whose output is low on real samples: its
    scores are negated first. In a relativistic loss the generator minimises the mean of h over the fake samples'
    differences and, for relation "average", over the real samples' with the sign turned: with h = -f and
    g(y) = f(-y) this is the critic's loss with the roles of real and fake swapped.

    Scores have shape (B,), (B, 1, ...) or (B, n, ...), where every score of a sample counts alike (PatchGAN), any
    floating dtype; those below float32 are computed, and the loss returned, in float32. Differentiable to any order.
    The two sides may differ in B except for relation "pair".
    """

    name: str
    f: Component
    g: Component
    h: Component
    doc: str = ""
    relation: str = "none"
    epsilon: float = 1.0
    low_is_real: bool = False

    def __post_init__(self) -> None:
        for side in ("f", "g", "h"):
            if not isinstance(getattr(self, side), Component):
                raise TypeError(f"{side}: wanted a Component (compose makes one), got {getattr(self, side)!r}")
        check_choice("relation", self.relation, RELATIONS)
        if check_number("epsilon", self.epsilon) <= 0:
            raise fail("epsilon", "a number > 0", self.epsilon)
        if self.needs_real and self.epsilon != 1:
            raise fail("epsilon", "1 for a relativistic loss, whose sides swap roles", self.epsilon)

    @property
    def needs_real(self) -> bool:
        """True for a relativistic loss: its generator needs the scores of real samples too."""
        return self.relation != "none"

    def critic(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """-(epsilon mean f + mean g), a scalar. Raises ValueError or TypeError for scores that do not fit."""
        of_real, of_fake = RELATIONS[self.relation].critic(*self._both(real_scores, fake_scores))
        return -(self.epsilon * _mean(self.f, "f", of_real) + _mean(self.g, "g", of_fake))

    def generator(self, fake_scores: Tensor, real_scores: Tensor | None = None) -> Tensor:
        """mean h, a scalar. Relativistic losses need `real_scores`, the others ignore them."""
        if not self.needs_real:
            return _mean(self.h, "h", self._flat("fake_scores", fake_scores))
        if real_scores is None:
            raise fail("real_scores", f"the scores of real samples, which {self.name!r} compares with", "None")
        seen = RELATIONS[self.relation].generator(*self._both(real_scores, fake_scores))
        return torch.stack([_mean(self.h, "h", y) for y in seen]).sum()

    def _both(self, real_scores: Tensor, fake_scores: Tensor) -> tuple[Tensor, Tensor]:
        real, fake = self._flat("real_scores", real_scores), self._flat("fake_scores", fake_scores)
        if real.shape[1] != fake.shape[1]:
            raise fail("fake_scores", f"{real.shape[1]} scores a sample, as real_scores has", tuple(fake_scores.shape))
        if self.relation == "pair" and len(real) != len(fake):
            raise fail("fake_scores", f"{len(real)} samples, each the partner of a real one", len(fake))
        return real, fake

    def _flat(self, name: str, scores: Tensor) -> Tensor:
        check_floating(name, scores)
        y = scores.reshape(len(scores), -1).to(accumulation_dtype(scores.dtype))
        return -y if self.low_is_real else y


def _mean(component: Component, side: str, y: Tensor) -> Tensor:
    values = component.function(y)
    if not isinstance(values, Tensor):
        raise TypeError(f"{side}: wanted a function that returns a torch.Tensor, got {type(values).__name__}")
    if values.shape != y.shape:
        raise fail(side, f"a value a score, shape {tuple(y.shape)}", tuple(values.shape))
    return values.mean()


def as_component(side: str, what: str | Component | Callable[[Tensor], Tensor]) -> Component:
    """A component from itself, its name, a formula in y, or an elementwise function of tensors."""
    if isinstance(what, Component):
        return what
    if isinstance(what, str):
        return COMPONENTS.get(what) or Component(what, parse(what, side))
    if not callable(what):
        raise TypeError(f"{side}: wanted a component's name, a formula in y or a function, got {type(what).__name__}")
    return Component(getattr(what, "__name__", type(what).__name__), what)


def compose(
    name: str,
    f: str | Component | Callable[[Tensor], Tensor],
    g: str | Component | Callable[[Tensor], Tensor],
    h: str | Component | Callable[[Tensor], Tensor],
    *,
    doc: str = "",
    relation: str = "none",
    epsilon: float = 1.0,
    low_is_real: bool = False,
) -> Loss:
    """A loss from f, g, h of one's own: names of COMPONENTS, formulas such as "-(y - 2)^2", or elementwise functions.

    `examine` says whether f and g can work. Raises ValueError or TypeError, naming the argument.
    """
    f, g, h = as_component("f", f), as_component("g", g), as_component("h", h)
    return Loss(name, f, g, h, doc=doc, relation=relation, epsilon=epsilon, low_is_real=low_is_real)
