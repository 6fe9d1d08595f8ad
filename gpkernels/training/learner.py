"""The nets, their optimizers, and one training step."""

from __future__ import annotations

import copy
import time
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import gpkernels as gp
from gpkernels.errors import UserError
from gpkernels.losses import presume_labels
from gpkernels.training import checkpoint, models, plugins, randomness
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import ImageSet
from gpkernels.training.models.norms import still_statistics
from gpkernels.training.objective import Batch, Penalties
from gpkernels.training.optimizers import clip_weights, make_optimizer

SAMPLES = 64


class Learner:
    """Generator, critic and the generator's average, and `train_step`, which moves them on by one step.

    Everything random of a step is a function of (seed, step): a learner that loaded the state of another goes on as
    that would have done, to the same bits on a CPU.

    `generator`, `critic` and `objective` take the place of the config's (see `plugins`); the nets are moved to the
    device and trained themselves, not copies. Raises UserError where they do not fit the config and the images.
    """

    def __init__(
        self,
        config: TrainConfig,
        images: ImageSet | Any,
        *,
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        objective: Any = None,
    ) -> None:
        images = plugins.image_set(images)
        self.config, self.images = config, images
        self.given = plugins.given(generator=generator, critic=critic, objective=objective)
        self.classes = 0 if config.condition == "none" else images.classes
        self.device = pick_device(config.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        randomness.seed(config.seed)
        self.generator, self.critic = (
            net.to(self.device, memory_format=self.memory_format)
            for net in plugins.nets(config, images, generator, critic)
        )
        self.ema = copy.deepcopy(self.generator).to(memory_format=torch.contiguous_format)
        self.ema.eval().requires_grad_(False)
        self.objective, self.penalties = plugins.objective(config, objective), Penalties(config)
        if self.given:
            plugins.check(self)
        self.optimizers = {
            name: make_optimizer(config, name, getattr(self, name).parameters(), self.penalties)
            for name in ("generator", "critic")
        }
        self.fixed_z = models.draw_z(config, SAMPLES, torch.Generator().manual_seed(config.seed))
        self.step = 0
        self.input_seconds = 0.0
        """How long steps have waited for their images."""
        images.reside_on(self.device)

    @property
    def total_steps(self) -> int:
        return self.config.steps or -(-self.config.epochs * self.images.epoch_images // self._step_images)

    def epochs_after(self, step: int) -> int:
        """How many epochs are over after so many steps."""
        return step * self._step_images // self.images.epoch_images

    @property
    def _step_images(self) -> int:
        return self.config.batch_size * self.config.critic_steps

    def train_step(self) -> dict[str, Tensor]:
        """The updates of the critic and one of the generator. Returns the last terms, detached scalars."""
        config = self.config
        draws = self._draws(self.step)
        for index in range(config.critic_steps):
            batch = self._batch(self.step * config.critic_steps + index, draws)
            # the critic sees images without a graph; the generator's own update may go through those of its last one
            with torch.set_grad_enabled(index == config.critic_steps - 1 and not config.fresh_z):
                fake = self._generate(batch, draws)
            terms = self._update_critic(batch, fake, draws)
        if config.fresh_z:
            fake = self._generate(batch, draws)
        generator_loss = self._update_generator(batch, fake)
        self._update_average()
        self.step += 1
        return {**terms, "generator_loss": generator_loss}

    def _update_critic(self, batch: Batch, fake: Tensor, draws: torch.Generator) -> dict[str, Tensor]:
        fake = fake.detach()
        score_real, score_fake, penalty = self.penalties(self.critic, batch, fake, draws)
        found = self.objective.critic(score_real, score_fake, batch, fake)
        loss = found.loss + penalty
        self._update("critic", loss)
        if self.config.clip is not None:
            clip_weights(self.critic.parameters(), self.config.clip)
        terms = {"critic_loss": loss.detach(), **found.terms}
        return {**terms, "penalty": penalty.detach()} if self.penalties.each else terms

    def _update_generator(self, batch: Batch, fake: Tensor) -> Tensor:
        self.critic.requires_grad_(False)
        with still_statistics(self.critic):
            score_real = self.critic(batch.real, *batch.y) if self.objective.needs_real else None
            loss = self.objective.generator(self.critic(fake, *batch.y), score_real)
        self._update("generator", loss)
        self.critic.requires_grad_(True)
        return loss.detach()

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

    def _generate(self, batch: Batch, draws: torch.Generator) -> Tensor:
        z = models.draw_z(self.config, len(batch.real), draws).to(self.device)
        return self.generator(z, *batch.y)

    def _draws(self, step: int) -> torch.Generator:
        """The random numbers of a step, which depend on nothing but its number."""
        return torch.Generator().manual_seed((self.config.seed << 32) + step + 1)

    def _batch(self, number: int, draws: torch.Generator) -> Batch:
        """The images of a critic's update, and their labels: where training may not know one, the critic's guess."""
        config = self.config
        started = time.perf_counter()
        real = self._to_device(self.images.batch(config, number, draws))
        self.input_seconds += time.perf_counter() - started
        if config.condition == "none":
            return Batch(real)
        y, known = (t.to(self.device) for t in self.images.batch_labels(config, number))
        if config.labels is None:
            return Batch(real, (y,))
        y, weights = presume_labels(
            self.critic.guess(real),
            y,
            known,
            weight=config.unlabelled_weight,
            confidence=config.unlabelled_confidence,
        )
        return Batch(real, (y,), weights)

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, memory_format=self.memory_format)

    def sample(self, z: Tensor) -> Tensor:
        """Images of the averaged generator, on the CPU: (B, channels, size, size) in [-1, 1].

        With a condition they go through the classes in turn.
        """
        return models.images_of(self.ema, z, models.labels_in_turn(self.classes, len(z)))

    def grad_norms(self) -> Tensor:
        """The l2 norm of the critic's gradient at each real image of the last step, (B,), in eval mode.

        None is above the critic's Lipschitz constant, so the largest is a lower bound of it. Changes nothing.
        """
        number = (self.step - 1) * self.config.critic_steps
        batch = self._batch(number, self._draws(self.step - 1))
        training = self.critic.training
        self.critic.eval()
        x = batch.real.requires_grad_()
        with gp.fast_double_backward():
            scores = self.critic(x, *batch.y)
        (grad,) = torch.autograd.grad(scores.sum(), x)
        self.critic.train(training)
        return gp.grad_norm(grad)

    def weight_gradients(self) -> dict[str, float]:
        """The l2 norm, over all weights, of the gradient of each net's last update."""
        norms = {}
        for name in self.optimizers:
            grads = [p.grad for p in getattr(self, name).parameters() if p.grad is not None]
            norms[f"{name}_weight_grad"] = torch.nn.utils.get_total_norm(grads).item()
        return norms

    def classification_error(self) -> float | None:
        """The share of held-out images that the critic of condition "classes" puts into a wrong class; None where
        there is no such critic or nothing is held out."""
        if not isinstance(self.critic, models.ClassifierCritic):
            return None
        held_out = self._held_out
        if held_out is None or held_out.labels is None:
            return None
        wrong = 0
        for begin in range(0, len(held_out.images), 500):
            chosen = slice(begin, begin + 500)
            images = torch.from_numpy(held_out.images[chosen]).float() / 127.5 - 1
            guessed = self.critic.guess(self._to_device(images)).argmax(1)
            wrong += int((guessed.cpu() != torch.from_numpy(held_out.labels[chosen])).sum())
        return wrong / len(held_out.images)

    @cached_property
    def _held_out(self) -> ImageSet | None:
        """Read once a run."""
        return self.images.held_out()

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "given": self.given,
            "channels": self.images.channels,
            "size": self.images.size,
            "classes": self.images.classes,
            "step": self.step,
            "generator": self.generator.state_dict(),
            "ema": self.ema.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "penalties": self.penalties.state_dict(),
            "rng": randomness.state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        plugins.check_given(self.given, state.get("given", {}))
        for name in ("generator", "ema", "critic"):
            checkpoint.load_weights(getattr(self, name), state[name], name)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))  # else `state` would train too
        self.penalties.load_state_dict(state["penalties"])
        randomness.restore(state["rng"], self.device)
        self.step = state["step"]


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
