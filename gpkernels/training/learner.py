"""The nets, their optimizers, and one training step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import gpkernels as gp
from gpkernels.errors import UserError
from gpkernels.pixels import to_float
from gpkernels.spectral import spectral_norm_handle
from gpkernels.training import checkpoint, draws, models, plugins, randomness
from gpkernels.training import processes as processes_module
from gpkernels.training.config import TrainConfig, check_unchanged
from gpkernels.training.data import ImageSet
from gpkernels.training.models.batch_norm import synchronise
from gpkernels.training.models.modes import eval_mode
from gpkernels.training.objective import Batch, Penalties
from gpkernels.training.optimizers import make_optimizer
from gpkernels.training.precision import Precision
from gpkernels.training.processes import Processes
from gpkernels.training.updates import Inputs, Updates

SAMPLES = 64


class Learner(Updates):
    """Generator, critic and the generator's average, and `train_step`, which moves them on by one step.

    Everything random of a step is a function of (seed, step): a learner that loaded the state of another goes on as
    that would have done, to the same bits on a CPU. With several `processes` (default: those joined) each takes its
    part of every batch; together they are, up to rounding, one that takes all of it.

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
        processes: Processes | None = None,
    ) -> None:
        images = plugins.image_set(images)
        self.config, self.images = config, images
        self.about_images = images.about(config)
        self.given = plugins.given(generator=generator, critic=critic, objective=objective)
        self.classes = 0 if config.condition == "none" else images.classes
        self.processes = processes or processes_module.current(config.device)
        self.device = self.processes.device
        check_parts(config, self.processes)
        check_images(images, self.processes)
        if config.cuda_graph and self.device.type != "cuda":
            raise UserError(f"--cuda-graph: wanted a GPU, got --device {self.device}")
        self.precision = Precision(config.precision, self.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        randomness.seed(config.seed)
        self.generator, self.critic = (
            net.to(self.device, memory_format=self.memory_format)
            for net in plugins.nets(config, images, generator, critic)
        )
        spectral_norm_handle(self.critic).update()  # u and v of these weights, in this layout: what a checkpoint keeps
        self.ema = copy.deepcopy(self.generator)
        self.ema.to(memory_format=torch.contiguous_format)
        self.ema.eval().requires_grad_(False)
        self.objective, self.penalties = plugins.objective(config, objective), Penalties(config)
        if self.given:
            plugins.check(self)
        if config.sync_batchnorm and self.processes.count > 1:
            synchronise(self.generator)
            synchronise(self.critic)
        self.trained = {name: plugins.trained(name, getattr(self, name)) for name in ("generator", "critic")}
        self._parallel = {name: self.processes.parallel(getattr(self, name)) for name in ("generator", "critic")}
        self.optimizers = {
            name: make_optimizer(config, name, parameters, self.penalties) for name, parameters in self.trained.items()
        }
        self.fixed_z = models.draw_z(config, SAMPLES, torch.Generator().manual_seed(config.seed))
        self.step = 0
        self._graphs: dict[tuple[bool, ...], Callable[..., dict[str, Tensor]]] = {}
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
        """The updates of the critic and one of the generator. Returns the last terms: detached scalars, of this
        process's part of the batch, which the next step may overwrite."""
        calls, count = self.penalties.calls, self.config.critic_steps
        inputs = self._inputs()
        if self.config.cuda_graph:
            leaves, layout = tree_flatten(inputs)
            due = tuple(self.penalties.is_due(calls + i) for i in range(count))  # a graph has its branches fixed
            if due not in self._graphs:
                self._graphs[due] = gp.graphed(lambda *leaves: self._updates(tree_unflatten(leaves, layout)))
            terms = self._graphs[due](*leaves)
        else:
            terms = self._updates(inputs)
        self.penalties.calls = calls + count
        self.step += 1
        return terms

    def _inputs(self) -> dict[str, Any]:
        """What the step takes from outside: all that is random, and what depends on its number."""
        config, drawn = self.config, self._draws(self.step)
        updates = []
        for index in range(config.critic_steps):
            update = self._images(self.step * config.critic_steps + index, drawn)
            update["z"] = draws.latents(config, drawn, self.processes)
            for kind in self.penalties.kinds:
                if kind in draws.AROUND:
                    update[kind] = draws.AROUND[kind].draw(config, update["real"], drawn, self.processes)
            updates.append(update)
        decay = min(config.ema, (1 + self.step) / (10 + self.step))  # faster in the first steps
        found = {"updates": updates, "ema": torch.tensor(1 - decay, device=self.device)}
        if config.fresh_z:
            found["z"] = draws.latents(config, drawn, self.processes)
        return found

    def _draws(self, step: int) -> torch.Generator:
        return draws.generator_of(self.config, step)

    def _batch(self, number: int, drawn: torch.Generator) -> Batch:
        """This process's part of the batch of a critic's update."""
        return self._as_batch(self._images(number, drawn))

    def _images(self, number: int, drawn: torch.Generator) -> Inputs:
        config, shard = self.config, self.processes.shard
        started = time.perf_counter()
        images = self.images.batch(config, number, drawn, shard)
        found = {"real": images.to(self.device, memory_format=self.memory_format)}
        self.input_seconds += time.perf_counter() - started
        if config.condition != "none":
            labels = self.images.batch_labels(config, number, shard)
            found |= {name: value.to(self.device) for name, value in zip(("y", "known"), labels, strict=True)}
        return found

    def sample(self, z: Tensor) -> Tensor:
        """Images of the averaged generator, on the CPU: (B, channels, size, size) in [-1, 1].

        With a condition they go through the classes in turn.
        """
        return models.images_of(self.ema, z, models.labels_in_turn(self.classes, len(z)))

    def grad_norms(self) -> Tensor:
        """The l2 norm of the critic's gradient at each real image of the last step, this process's part, in eval mode.

        None is above the critic's Lipschitz constant, so the largest is a lower bound of it. Changes nothing.
        """
        number = (self.step - 1) * self.config.critic_steps
        batch = self._batch(number, self._draws(self.step - 1))
        x = batch.real.requires_grad_()
        with eval_mode(self.critic), gp.fast_double_backward():
            scores = self.critic(x, *batch.y)
        (grad,) = torch.autograd.grad(scores.sum(), x)
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
            images = to_float(torch.from_numpy(held_out.images[chosen]))
            guessed = self.critic.guess(images.to(self.device, memory_format=self.memory_format)).argmax(1)
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
            "images": self.about_images,
            "step": self.step,
            "generator": self.generator.state_dict(),
            "ema": self.ema.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "penalties": self.penalties.state_dict(),
            "precision": self.precision.state_dict(),
            "rng": randomness.state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for a state of other settings, but for those of `config.CHANGEABLE`, or of other parts."""
        check_unchanged(state["config"], self.config.to_dict())
        plugins.check_given(self.given, state.get("given", {}))
        for name in ("generator", "ema", "critic"):
            checkpoint.load_weights(getattr(self, name), state[name], name)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))  # else `state` would train too
        self.penalties.load_state_dict(state["penalties"])
        self.precision.load_state_dict(state["precision"])
        randomness.restore(state["rng"], self.device)
        self.step = state["step"]


def check_parts(config: TrainConfig, processes: Processes) -> None:
    """Raises UserError if the batch cannot be computed in the parts that the config and the processes make of it."""
    parts = processes.count * config.accumulate
    if config.batch_size % parts:
        made = f"{processes.count} processes" + (
            f" x --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        )
        raise UserError(f"--batch-size: wanted a multiple of {parts} ({made}), got {config.batch_size}")
    if parts > 1 and config.penalty != "none" and config.penalty_axes == "batch":
        raise UserError("--penalty-axes: wanted sample or pixel for a batch that is computed in parts, got batch")
    if processes.count > 1 and config.cuda_graph:
        raise UserError(f"--cuda-graph: wanted one process, got {processes.count}")


def check_images(images: ImageSet, processes: Processes) -> None:
    """Raises UserError if this process has other images than the main one, as on machines that each have a copy."""
    if processes.count == 1:
        return
    mine = images.fingerprint()
    if processes.agree(lambda: mine) != mine:
        raise UserError(
            f"--data: wanted the images and labels of process 0 on every machine, got others in process "
            f"{processes.index} ({len(images.images)} images of {images.name})"
        )
