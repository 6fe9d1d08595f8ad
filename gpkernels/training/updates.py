"""What a step does to the nets, given everything that is random: its updates, each in one part of the batch or more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.losses import presume_labels
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import Shard
from gpkernels.training.models.norms import still_statistics
from gpkernels.training.objective import Batch, Objective, Penalties
from gpkernels.training.optimizers import clip_weights
from gpkernels.training.precision import Precision
from gpkernels.training.processes import Processes
from gpkernels.training.whole import of_the_whole

Inputs = dict[str, Tensor]
"""What an update is given, this process's part of it, by name: `real` and `z`; `y` and `known` with a condition; and by
kind what a penalty draws. Each has as many rows as the part has images."""


class Updates:
    """The updates of a step, by the nets and all that `Learner` makes."""

    config: TrainConfig
    processes: Processes
    precision: Precision
    generator: nn.Module
    critic: Any  # with `guess` where labels may be unknown
    ema: Any
    objective: Objective
    penalties: Penalties
    trained: dict[str, list[nn.Parameter]]
    optimizers: dict[str, Any]
    _parallel: dict[str, nn.Module]

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
            terms = {"critic_loss": value, **found}
            return {**terms, "penalty": penalty} if self.penalties.each else terms

        terms = self._minimise("critic", terms_of)
        if self.config.clip is not None:
            clip_weights(self.trained["critic"], self.config.clip)
        return terms

    def _update_generator(
        self, zs: Sequence[Tensor], batches: Sequence[Batch], fakes: Sequence[Tensor] | None
    ) -> Tensor:
        """`fakes` are the images of `zs` where there are some, with their graph if in one part."""
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
                with still_statistics(self.generator, fakes is not None):
                    fake = self._generate(zs[index], batch)
            with still_statistics(self.critic):
                real_scores = self.critic(batch.real, *batch.y) if self.objective.needs_real else None
                scores = self.critic(fake, *batch.y), real_scores
            loss = self._of_the_batch(self.objective.generator, scores, wholes and wholes[::-1], index)
            return {"generator_loss": loss}

        with _frozen(self.trained["critic"]):
            return self._minimise("generator", terms_of)["generator_loss"]

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
        with torch.no_grad(), self.precision.autocast(), still_statistics(self.critic):
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

    def _as_batch(self, part: Inputs) -> Batch:
        """With labels: where training may not know one, the critic's guess."""
        if "y" not in part:
            return Batch(part["real"])
        if self.config.labels is None:
            return Batch(part["real"], (part["y"],))
        guessed = self.critic.guess(part["real"])
        weight, confidence = self.config.unlabelled_weight, self.config.unlabelled_confidence
        y, weights = presume_labels(guessed, part["y"], part["known"], weight=weight, confidence=confidence)
        return Batch(part["real"], (y,), weights)


@contextlib.contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _floating(module: nn.Module) -> list[Tensor]:
    """The floating-point tensors of its state, each once, though a layer may stand in it under several names."""
    state = {id(value): value for value in module.state_dict(keep_vars=True).values()}
    return [value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()]
