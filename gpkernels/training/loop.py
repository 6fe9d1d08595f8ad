"""The trainer: one critic step and one generator step at a time, everything about a run in one folder.

A run folder holds config.json, log.jsonl (a line every `log_every` steps), samples/epoch_NNNN.png (the averaged
generator on the same latent vectors), curves.png and checkpoint.pt.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gpkernels as gp
from gpkernels.errors import UserError
from gpkernels.kinds import KINDS
from gpkernels.training import checkpoint, losses, models, pictures
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import ImageSet

SAMPLES = 64


class Trainer:
    """Trains `config` on `images` into the folder `out`.

    `resume` is a state from `checkpoint.load`: training goes on after its step, and on a CPU ends with the same
    bits as a run that was never interrupted. `run` returns True when the run is finished, False when `should_stop`
    ended it early; both leave a checkpoint.
    """

    def __init__(
        self, config: TrainConfig, images: ImageSet, out: Path, *, resume: dict[str, Any] | None = None
    ) -> None:
        self.config, self.images, self.out = config, images, out
        self.device = pick_device(config.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        torch.manual_seed(config.seed)
        self.generator, self.critic = (
            net.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
            for net in models.build(config, images.channels, images.size, images.classes)
        )
        self.ema, _ = models.build(config, images.channels, images.size, images.classes)
        self.ema.to(self.device).load_state_dict(self.generator.state_dict())
        self.ema.eval().requires_grad_(False)
        self.penalty = make_penalty(config)
        self.optimizers = {name: self._adam(name) for name in ("generator", "critic")}
        self.fixed_z = torch.randn(SAMPLES, config.nz, generator=torch.Generator().manual_seed(config.seed))
        self.step = 0
        if resume is not None:
            self._restore(resume)

    @property
    def steps_per_epoch(self) -> int:
        return self.images.steps_per_epoch(self.config.batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.steps or self.config.epochs * self.steps_per_epoch

    def train_step(self) -> dict[str, Tensor]:
        """One update of the critic and one of the generator. Returns the step's terms, detached scalars."""
        config = self.config
        draws = torch.Generator().manual_seed((config.seed << 32) + self.step + 1)
        real = self._to_device(self.images.batch(config, self.step, draws))
        z = torch.randn(len(real), config.nz, generator=draws).to(self.device)
        y = self._labels(real, self.step)
        fake = self.generator(z, *y)

        score_real, penalty = self._score_and_penalty(real, fake, y, draws)
        score_fake = self.critic(fake.detach(), *y)
        margin = losses.margins(real, fake, config.margin)
        terms = losses.critic_terms(score_real, score_fake, margin, slope=config.slope, gamma=config.gamma)
        critic_loss = terms.loss + penalty
        self._update("critic", critic_loss)

        self.critic.requires_grad_(False)
        generator_loss = losses.generator_loss(self.critic(fake, *y))
        self._update("generator", generator_loss)
        self.critic.requires_grad_(True)
        self._update_average()
        self.step += 1
        return {
            "critic_loss": critic_loss.detach(),
            "generator_loss": generator_loss.detach(),
            "loss_real": terms.real,
            "loss_fake": terms.fake,
            "gap": terms.fake - terms.real,
            "margin": terms.margin,
            "penalty": penalty.detach(),
        }

    def run(
        self,
        report: Callable[[dict[str, Any]], None] = lambda record: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        (self.out / "samples").mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(
            self.out / "config.json", lambda file: file.write(json.dumps(self.config.to_dict(), indent=2).encode())
        )
        self._keep_log_up_to(self.step)
        started, images = time.perf_counter(), 0
        with (self.out / "log.jsonl").open("a") as log:
            while self.step < self.total_steps and not should_stop():
                terms = self.train_step()
                images += self.config.batch_size
                last = self.step == self.total_steps
                if self.step % self.config.log_every == 0 or self.step == 1 or last:
                    record = self._record(terms)
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    rate = images / (time.perf_counter() - started)
                    started, images = time.perf_counter(), 0
                    report({**record, "images_per_second": rate})
                if self.step % self.steps_per_epoch == 0 or last:
                    epoch = math.ceil(self.step / self.steps_per_epoch)
                    pictures.save_grid(self.out / "samples" / f"epoch_{epoch:04d}.png", self.sample(self.fixed_z))
                    self.save()
        self.save()
        pictures.save_curves(self.out / "curves.png", pictures.read_log(self.out / "log.jsonl"))
        return self.step >= self.total_steps

    def sample(self, z: Tensor) -> Tensor:
        """Images of the averaged generator, on the CPU: (B, channels, size, size) in [-1, 1].

        With a condition they go through the classes in turn.
        """
        with torch.no_grad():
            return self.ema(z.to(self.device), models.labels_in_turn(self.ema, len(z), self.device)).cpu()

    def save(self) -> None:
        state = {
            "config": self.config.to_dict(),
            "channels": self.images.channels,
            "size": self.images.size,
            "classes": self.images.classes,
            "step": self.step,
            "generator": self.generator.state_dict(),
            "ema": self.ema.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "penalty": self.penalty.state_dict() if self.penalty else {},
            "rng": torch.get_rng_state(),
        }
        checkpoint.save(self.out / checkpoint.NAME, state)

    def _labels(self, real: Tensor, step: int) -> tuple[Tensor, ...]:
        """The labels of a step's images, (y,), or () without a condition.

        Where training may not know one, it is the critic's own: argmin_y L(x, y) [memory].
        """
        if self.config.condition == "none":
            return ()
        y, known = (t.to(self.device) for t in self.images.batch_labels(self.config, step))
        if isinstance(self.critic, models.ClassifierCritic) and self.config.labels is not None:
            y = torch.where(known, y, self.critic.predict(real))
        return (y,)

    def _score_and_penalty(
        self, real: Tensor, fake: Tensor, y: tuple[Tensor, ...], draws: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The critic on real images, and the penalty: from one forward where the penalty lies at real images."""
        if self.penalty is None:
            return self.critic(real, *y), torch.zeros((), device=self.device)
        kind = KINDS[self.penalty.kind]
        if kind.at_samples and kind.inputs == ("real",):
            return self.penalty.score_and_penalty(self.critic, real, critic_args=y)
        return self.critic(real, *y), self.penalty(self.critic, real, fake, generator=draws, critic_args=y)

    def _update(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def _update_average(self) -> None:
        """The moving average of the generator and of its BatchNorm statistics, faster in the first steps."""
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, value in zip(_floating(self.ema), _floating(self.generator), strict=True):
                average.lerp_(value, 1 - decay)

    def _record(self, terms: dict[str, Tensor]) -> dict[str, Any]:
        record: dict[str, Any] = {"step": self.step, "epoch": (self.step - 1) // self.steps_per_epoch + 1}
        record |= {name: value.item() for name, value in terms.items()}
        record["grad_norm"] = self._mean_grad_norm()
        bad = [name for name, value in record.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"training diverged: {bad[0]} is {record[bad[0]]} at step {self.step}; the last checkpoint is kept "
                f"in {self.out} (try a lower --lr)"
            )
        return record

    def _mean_grad_norm(self) -> float:
        """The mean l2 norm of the critic's gradient at the images of the last step; changes nothing."""
        draws = torch.Generator().manual_seed((self.config.seed << 32) + self.step)
        real = self._to_device(self.images.batch(self.config, self.step - 1, draws))
        y = self._labels(real, self.step - 1)
        training = self.critic.training
        self.critic.eval()
        with torch.no_grad():
            value = gp.gradient_penalty(self.critic, real, kind="r1", form="linear", weight=1.0, critic_args=y)
        self.critic.train(training)
        return value.item()

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, memory_format=self.memory_format)

    def _adam(self, name: str) -> torch.optim.Adam:
        config = self.config
        settings: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2)}
        if name == "critic" and self.penalty is not None:
            settings = self.penalty.lazy_adam(**settings)
        return torch.optim.Adam(getattr(self, name).parameters(), fused=True, **settings)

    def _restore(self, state: dict[str, Any]) -> None:
        for name in ("generator", "ema", "critic"):
            checkpoint.load_weights(getattr(self, name), state[name], name)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        if self.penalty is not None:
            self.penalty.load_state_dict(state["penalty"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]

    def _keep_log_up_to(self, step: int) -> None:
        """Drops the lines that an interrupted run wrote after its last checkpoint."""
        path = self.out / "log.jsonl"
        kept = [record for record in pictures.read_log(path) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def make_penalty(config: TrainConfig) -> gp.GradientPenalty | None:
    if config.penalty == "none":
        return None
    return gp.GradientPenalty(
        config.penalty,
        weight=config.penalty_weight,
        form=config.penalty_form,
        axes=config.penalty_axes,
        interval=config.penalty_interval,
    )


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: wanted a device torch can use, got {name!r} ({str(error).splitlines()[0]})"
        ) from None
    return device


def _floating(module: nn.Module) -> list[Tensor]:
    return [value for value in module.state_dict().values() if value.dtype.is_floating_point]
