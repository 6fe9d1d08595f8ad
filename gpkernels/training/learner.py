"""The nets, their optimizers, and one training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import gpkernels as gp
from gpkernels.errors import UserError
from gpkernels.losses import presume_labels
from gpkernels.training import checkpoint, draws, models
from gpkernels.training import processes as processes_module
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import ImageSet, Shard
from gpkernels.training.models.batch_norm import statistics_kept, synchronise
from gpkernels.training.objective import Batch, Penalties, make_objective
from gpkernels.training.optimizers import clip_weights, make_optimizer
from gpkernels.training.precision import Precision
from gpkernels.training.processes import Processes
from gpkernels.training.whole import of_the_whole

SAMPLES = 64

Inputs = dict[str, Tensor]
"""What an update is given, this process's part of it, by name: `real` and `z`; `y` and `known` with a condition; and by
kind what a penalty draws. Each has as many rows as the part has images."""


class Learner:
    """Generator, critic and the generator's average, and `train_step`, which moves them on by one step.

    Everything random of a step is a function of (seed, step): a learner that loaded the state of another goes on as
    that would have done, to the same bits on a CPU. With several `processes` (default: those joined) each takes its
    part of every batch; together they are, up to rounding, one that takes all of it.
    """

    def __init__(self, config: TrainConfig, images: ImageSet, *, processes: Processes | None = None) -> None:
        self.config, self.images = config, images
        self.processes = processes or processes_module.current(config.device)
        self.device = self.processes.device
        check_parts(config, self.processes)
        if config.cuda_graph and self.device.type != "cuda":
            raise UserError(f"--cuda-graph: wanted a GPU, got --device {self.device}")
        self.precision = Precision(config.precision, self.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        torch.manual_seed(config.seed)
        self.generator, self.critic = (
            net.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
            for net in models.build(config, images.channels, images.size, images.classes)
        )
        self.ema, _ = models.build(config, images.channels, images.size, images.classes)
        self.ema.to(self.device).load_state_dict(self.generator.state_dict())
        self.ema.eval().requires_grad_(False)
        if config.sync_batchnorm and self.processes.count > 1:
            synchronise(self.generator), synchronise(self.critic)
        self._parallel = {name: self.processes.parallel(getattr(self, name)) for name in ("generator", "critic")}
        self.objective, self.penalties = make_objective(config), Penalties(config)
        self.optimizers = {
            name: make_optimizer(config, name, getattr(self, name).parameters(), self.penalties)
            for name in ("generator", "critic")
        }
        self.fixed_z = models.draw_z(config, SAMPLES, torch.Generator().manual_seed(config.seed))
        self.step = 0
        self._graphs: dict[tuple[bool, ...], Callable[..., dict[str, Tensor]]] = {}

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

    def _updates(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The step: a function of tensors that draws nothing and reads nothing back, so that a graph can hold it."""
        calls, count = self.penalties.calls, self.config.critic_steps
        # in one part, the generator's own update goes through the images of the critic's last one
        shared = self.config.accumulate == 1 and not self.config.fresh_z
        for index, update in enumerate(inputs["updates"]):
            parts = self._cut(update)
            batches = [self._as_batch(part) for part in parts]
            with torch.set_grad_enabled(shared and index == count - 1):
                fakes = [self._generate(part["z"], batch) for part, batch in zip(parts, batches, strict=True)]
            terms = self._update_critic(parts, batches, fakes, calls + index)
        if "z" in inputs:
            fresh = [part["z"] for part in self._cut({"z": inputs["z"]})]
            terms["generator_loss"] = self._update_generator(fresh, batches, None)
        else:
            terms["generator_loss"] = self._update_generator([part["z"] for part in parts], batches, fakes)
        self._update_average(inputs["ema"])
        return terms

    def _cut(self, update: Inputs) -> list[Inputs]:
        """The equal parts of an update that are computed one after the other."""
        count = self.config.accumulate
        cut = {name: value.tensor_split(count) for name, value in update.items()}
        return [{name: values[index] for name, values in cut.items()} for index in range(count)]

    def _update_critic(
        self, parts: Sequence[Inputs], batches: Sequence[Batch], fakes: Sequence[Tensor], calls: int
    ) -> dict[str, Tensor]:
        """Without a gradient for the images; `calls` updates of the critic were before."""
        fakes = [fake.detach() for fake in fakes]
        critic, scaler = self._parallel["critic"], self.precision.scalers["critic"]
        wholes = self._score_all(batches, fakes) if self._meets and len(parts) > 1 else None

        def terms_of(index: int) -> dict[str, Tensor]:
            batch, fake = batches[index], fakes[index]
            self.penalties.calls = calls  # the parts are one call
            real_scores, fake_scores, penalty = self.penalties(critic, batch, fake, parts[index], scaler)
            found: dict[str, Tensor] = {}

            def loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
                result = self.objective.critic(real_scores, fake_scores, batch, fake)
                found.update(result.terms)
                return result.loss

            value = self._of_the_batch(loss, (real_scores, fake_scores), wholes, index) + penalty
            return {"critic_loss": value, **found, "penalty": penalty}

        terms = self._minimise("critic", terms_of)
        if self.config.clip is not None:
            clip_weights(self.critic.parameters(), self.config.clip)
        return terms

    def _update_generator(
        self, zs: Sequence[Tensor], batches: Sequence[Batch], fakes: Sequence[Tensor] | None
    ) -> Tensor:
        """`fakes` are the images of `zs` where there are some, with their graph if in one part."""
        self.critic.requires_grad_(False)
        wholes = None
        if self._meets and len(zs) > 1:
            if fakes is None:
                with torch.no_grad():
                    fakes = [self._generate(z, batch) for z, batch in zip(zs, batches, strict=True)]
            wholes = self._score_all(batches, fakes)

        def terms_of(index: int) -> dict[str, Tensor]:
            batch = batches[index]
            if fakes is not None and len(zs) == 1:
                fake = fakes[0]
            else:
                with statistics_kept(self.generator, fakes is not None):
                    fake = self._generate(zs[index], batch)
            real_scores = self.critic(batch.real, *batch.y) if self.objective.needs_real else None
            scores = self.critic(fake, *batch.y), real_scores
            loss = self._of_the_batch(self.objective.generator, scores, wholes and wholes[::-1], index)
            return {"generator_loss": loss}

        loss = self._minimise("generator", terms_of)["generator_loss"]
        self.critic.requires_grad_(True)
        return loss

    def _minimise(self, name: str, terms_of: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
        """An update of a net by the mean over the parts of the first of terms_of(part). Returns the terms' means."""
        optimizer, net, count = self.optimizers[name], self._parallel[name], self.config.accumulate
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for index in range(count):
            with self.processes.held(net, index < count - 1):
                with self.precision.autocast():
                    terms = terms_of(index)
                self.precision.backward(name, next(iter(terms.values())) / count)
            for key, value in terms.items():
                sums[key] = sums[key] + value.detach() if key in sums else value.detach()
        self.precision.step(name, optimizer)
        return {key: value / count for key, value in sums.items()}

    @property
    def _meets(self) -> bool:
        """Whether the loss is one in which samples of different parts meet."""
        parts = self.processes.count * self.config.accumulate
        return parts > 1 and getattr(self.objective, "mixes_samples", True)

    def _score_all(self, batches: Sequence[Batch], fakes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The critic's scores of all of this process's real and fake images; changes nothing."""
        with torch.no_grad(), self.precision.autocast(), statistics_kept(self.critic):
            reals = [self.critic(batch.real, *batch.y) for batch in batches]
            scores = [self.critic(fake, *batch.y) for fake, batch in zip(fakes, batches, strict=True)]
        return torch.cat(reals), torch.cat(scores)

    def _of_the_batch(
        self,
        loss: Callable[..., Tensor],
        scores: tuple[Tensor | None, ...],
        wholes: tuple[Tensor, ...] | None,
        index: int,
    ) -> Tensor:
        """`loss` of a part's scores, to be averaged over the parts; `wholes` are those of the process's whole part."""
        if not self._meets:
            return loss(*scores)
        count = self.config.accumulate
        mine = scores if wholes is None else wholes
        gathered = [
            None if own is None or part is None else self.processes.gather(own)
            for own, part in zip(mine, scores, strict=True)
        ]
        shard = Shard(self.processes.index * count + index, self.processes.count * count)
        return of_the_whole(loss, scores, gathered, shard)

    def _update_average(self, weight: Tensor) -> None:
        """The moving average of the generator and of its BatchNorm statistics."""
        averages, values = _floating(self.ema), _floating(self.generator)
        with torch.no_grad():
            steps = torch._foreach_sub(values, averages)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(averages, steps)

    def _generate(self, z: Tensor, batch: Batch) -> Tensor:
        """Images in the dtype of z, whatever the precision."""
        net = self._parallel["generator"] if torch.is_grad_enabled() else self.generator
        with self.precision.autocast():
            return net(z, *batch.y).to(z.dtype)

    def _draws(self, step: int) -> torch.Generator:
        return draws.generator_of(self.config, step)

    def _batch(self, number: int, drawn: torch.Generator) -> Batch:
        """This process's part of the batch of a critic's update."""
        return self._as_batch(self._images(number, drawn))

    def _images(self, number: int, drawn: torch.Generator) -> Inputs:
        config, shard = self.config, self.processes.shard
        images = self.images.batch(config, number, drawn, shard)
        found = {"real": images.to(self.device, memory_format=self.memory_format)}
        if config.condition != "none":
            labels = self.images.batch_labels(config, number, shard)
            found |= {name: value.to(self.device) for name, value in zip(("y", "known"), labels, strict=True)}
        return found

    def _as_batch(self, part: Inputs) -> Batch:
        """With labels: where training may not know one, the critic's guess."""
        if "y" not in part:
            return Batch(part["real"])
        if self.config.labels is None:
            return Batch(part["real"], (part["y"],))
        guessed = self.critic.guess(part["real"])
        y, weights = presume_labels(guessed, part["y"], part["known"], weight=self.config.unlabelled_weight)
        return Batch(part["real"], (y,), weights)

    def sample(self, z: Tensor) -> Tensor:
        """Images of the averaged generator, on the CPU: (B, channels, size, size) in [-1, 1].

        With a condition they go through the classes in turn.
        """
        with torch.no_grad():
            return self.ema(z.to(self.device), models.labels_in_turn(self.ema, len(z), self.device)).cpu()

    def mean_grad_norm(self) -> Tensor:
        """The mean l2 norm of the critic's gradient at the last step's images, this process's part; changes nothing."""
        number = (self.step - 1) * self.config.critic_steps
        batch = self._batch(number, self._draws(self.step - 1))
        training = self.critic.training
        self.critic.eval()
        with torch.no_grad():
            value = gp.gradient_penalty(
                self.critic, batch.real, kind="r1", form="linear", weight=1.0, critic_args=batch.y
            )
        self.critic.train(training)
        return value.double()

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
            "channels": self.images.channels,
            "size": self.images.size,
            "classes": self.images.classes,
            "step": self.step,
            "generator": self.generator.state_dict(),
            "ema": self.ema.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "penalties": self.penalties.state_dict(),
            "precision": self.precision.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("generator", "ema", "critic"):
            checkpoint.load_weights(getattr(self, name), state[name], name)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.penalties.load_state_dict(state["penalties"])
        self.precision.load_state_dict(state["precision"])
        torch.set_rng_state(state["rng"])
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


def _floating(module: nn.Module) -> list[Tensor]:
    return [value for value in module.state_dict().values() if value.dtype.is_floating_point]
