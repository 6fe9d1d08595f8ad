"""The penalty as a module: options checked once, lazy regularisation, a phase that checkpoints with the model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gpkernels import penalty
from gpkernels._checks import check_choice, check_count
from gpkernels.kinds import KINDS, Draw, check_draw

_ROOT = {"norm_eps": 1e-8}


class GradientPenalty(nn.Module):
    """`gradient_penalty` as a reusable object.

    With `interval` i the penalty is lazy (Karras et al. 2020, appendix B): every i-th call, the first included,
    returns i times the penalty, the others return 0 without running the critic. Adam's settings should then be
    corrected with `lazy_adam`. The phase is part of `state_dict`.

    Args: `kind`, `weight`, `form`, `target`, `norm`, `axes`, `norm_eps`, `noise`, `scale`, `per_element` and
    `microbatch` as in `gradient_penalty`; interval: a whole number >= 1.
    `presets` maps the names of published penalties to these arguments; `from_preset(name)` builds one.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {
            "wgan-gp": {"kind": "coupled"},
            "wgan-lp": {"kind": "coupled", "form": "one_sided"},
            "dragan": {"kind": "local"},
            "r1": {"kind": "r1"},
            "r1-lazy": {"kind": "r1", "interval": 16},
            "r2": {"kind": "r2"},
            "ls-gan-pg": {"kind": "ls_gan_pg", "axes": "pixel"},  # its public code
            # the many copies of WGAN-GP that take norm(2, dim=1) of a gradient not flattened
            "wgan-gp-pixel": {"kind": "coupled", "axes": "pixel"},
            # the public code of Dong and Yang 2019: r1 and r2 are not squared, the one-sided form is max(n, k);
            # [memory] for the size of the noise
            "dong-yang-coupled": {"kind": "coupled", "per_element": True, **_ROOT},
            "dong-yang-coupled-one-sided": {"kind": "coupled", "per_element": True, "form": "maximum", **_ROOT},
            "dong-yang-local": {"kind": "local", "noise": "normal", "scale": 0.01, **_ROOT},
            "dong-yang-r1": {"kind": "r1", "form": "linear", **_ROOT},
            "dong-yang-r2": {"kind": "r2", "form": "linear", **_ROOT},
        }
    )

    def __init__(
        self,
        kind: str = "coupled",
        *,
        weight: float = 10.0,
        form: str | None = None,
        target: float = 1.0,
        norm: str = "l2",
        axes: str = "sample",
        norm_eps: float = 0.0,
        noise: str | None = None,
        scale: float | None = None,
        per_element: bool = False,
        microbatch: int | None = None,
        interval: int = 1,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        penalty.make_measure(KINDS[kind], weight, form, target, norm, axes, norm_eps)
        check_draw(KINDS[kind], Draw(per_element=per_element, noise=noise, scale=scale))
        if microbatch is not None:
            check_count("microbatch", microbatch)
        self.interval = check_count("interval", interval)
        self.kind, self.weight, self.form, self.target = kind, weight, form, target
        self.norm, self.axes, self.norm_eps = norm, axes, norm_eps
        self.noise, self.scale, self.per_element, self.microbatch = noise, scale, per_element, microbatch
        self.calls = 0

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GradientPenalty:
        """The published penalty `name`, with any argument overridden. Raises ValueError for an unknown name."""
        check_choice("name", name, cls.presets)
        return cls(**{**cls.presets[name], **overrides})

    def forward(
        self,
        critic: penalty.Critic,
        real: Tensor | None,
        fake: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """The penalty, shape (); 0 on the steps that lazy regularisation skips."""
        if not self._due():
            x = fake if real is None else real
            return torch.zeros((), device=None if x is None else x.device)
        return penalty.gradient_penalty(
            critic,
            real,
            fake,
            **self._options(),
            noise=self.noise,
            scale=self.scale,
            eps=eps,
            per_element=self.per_element,
            generator=generator,
            critic_args=critic_args,
            critic_kwargs=critic_kwargs,
            scaler=scaler,
        )

    def score_and_penalty(
        self,
        critic: penalty.Critic,
        x: Tensor,
        *,
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`gpkernels.score_and_penalty` with these options; on skipped steps the scores and 0."""
        if not self._due():
            return critic(x, *critic_args, **(critic_kwargs or {})), torch.zeros((), device=x.device)
        return penalty.score_and_penalty(
            critic,
            x,
            **self._options(),
            critic_args=critic_args,
            critic_kwargs=critic_kwargs,
            scaler=scaler,
        )

    def lazy_adam(self, lr: float, betas: tuple[float, float]) -> dict[str, Any]:
        """Adam's `lr` and `betas` corrected for the interval: lr * i/(i+1) and betas^(i/(i+1)); unchanged for 1."""
        ratio = 1.0 if self.interval == 1 else self.interval / (self.interval + 1)
        return {"lr": lr * ratio, "betas": tuple(beta**ratio for beta in betas)}

    def extra_repr(self) -> str:
        return f"{self.kind!r}, weight={self.weight:g}, form={self.form}, axes={self.axes}, interval={self.interval}"

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def _due(self) -> bool:
        self.calls += 1
        return (self.calls - 1) % self.interval == 0

    def _options(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "weight": self.weight * self.interval,
            "form": self.form,
            "target": self.target,
            "norm": self.norm,
            "axes": self.axes,
            "norm_eps": self.norm_eps,
            "microbatch": self.microbatch,
        }
