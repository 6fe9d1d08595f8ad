"""What a program brings in place of what its config names: nets, a loss, a data set; checked before any training.

    generator(z, *y): z of shape (B, config.nz) to images (B, channels, size, size) in [-1, 1], floating-point
    critic(x, *y):    such images to scores of shape (B,) or (B, 1, ...); (B, n, ...) where the loss allows it
    objective:        a `gp.losses.Loss`, a `gp.losses.LossSensitive`, or an `objective.Objective`
    images:           an `ImageSet`, or a torch map-style data set

y is there with a condition alone: int64 labels of shape (B,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpkernels.errors import UserError
from gpkernels.losses import Loss, LossSensitive
from gpkernels.spectral import spectral_norm_all
from gpkernels.training import models
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import ImageSet
from gpkernels.training.models.modes import eval_mode
from gpkernels.training.objective import Batch, Framework, Objective, Sensitive, make_objective

_DRY = 4
_METHODS = ("critic", "generator")
RESERVED = frozenset({"step", "epoch", "critic_loss", "generator_loss", "penalty"})


def given(**what: Any) -> dict[str, str]:
    """The class of everything that is not None, by name, as a checkpoint keeps it."""
    return {name: f"{type(x).__module__}.{type(x).__qualname__}" for name, x in what.items() if x is not None}


def check_given(now: dict[str, str], then: dict[str, str]) -> None:
    """Raises UserError unless a run is resumed with the same classes that it was started with."""
    for name in {**then, **now}:
        if now.get(name) != then.get(name):
            wanted = f"{then[name]}, which the run was started with" if name in then else "none: its config names it"
            raise UserError(f"{name}: wanted {wanted}, got {now.get(name, 'none')} (Trainer(..., {name}=...))")


def image_set(images: Any) -> ImageSet:
    """Raises TypeError or ValueError as `ImageSet.from_dataset`."""
    return images if isinstance(images, ImageSet) else ImageSet.from_dataset(images)


def nets(
    config: TrainConfig, images: ImageSet, generator: nn.Module | None, critic: nn.Module | None
) -> tuple[Any, Any]:
    """The generator and the critic: those given, the others as the config has them."""
    for name, net in (("generator", generator), ("critic", critic)):
        if net is not None and not isinstance(net, nn.Module):
            raise UserError(f"{name}: wanted a torch.nn.Module, got {type(net).__name__}")
    if critic is not None and config.spectral_norm:
        spectral_norm_all(critic)
    if generator is not None and critic is not None:
        return generator, critic
    built = models.build(config, images.channels, images.size, images.classes)
    return built[0] if generator is None else generator, built[1] if critic is None else critic


def trained(name: str, net: nn.Module) -> list[nn.Parameter]:
    """The parameters of a net that training changes: those that its program has not frozen."""
    found = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if not found:
        raise UserError(f"{name}: wanted a parameter with requires_grad, got none")
    return found


def objective(config: TrainConfig, loss: Any) -> Objective:
    """The objective given, in the trainer's form; the config's for None."""
    if loss is None:
        return make_objective(config)
    if isinstance(loss, Loss):
        return Framework(loss)
    if isinstance(loss, LossSensitive):
        return Sensitive(loss)
    if hasattr(loss, "needs_real") and all(callable(getattr(loss, method, None)) for method in _METHODS):
        return loss
    raise UserError(
        "objective: wanted a gp.losses.Loss, a gp.losses.LossSensitive or an object with critic, generator and "
        f"needs_real (gpkernels.training.objective.Objective), got {type(loss).__name__}"
    )


def check(learner: Any) -> None:
    """One small batch through what was given, in eval mode: UserError for what does not fit. Changes nothing."""
    config, images = learner.config, learner.images
    with eval_mode(learner.generator, learner.critic), torch.random.fork_rng(devices=[]), torch.no_grad():
        z = models.draw_z(config, _DRY, torch.Generator().manual_seed(0)).to(learner.device)
        y = models.labels_in_turn(learner.classes, _DRY, learner.device)
        batch_y = () if y is None else (y,)
        x = _called("generator", learner.generator, z, *batch_y)
        _check_tensor("generator", "images", x, (_DRY, images.channels, images.size, images.size))
        scores = _called("critic", learner.critic, x, *batch_y)
        _check_tensor("critic", "scores", scores, (_DRY,))
        if config.labels is not None and not callable(getattr(learner.critic, "guess", None)):
            raise UserError("critic: wanted a method guess(x) that gives logits, for --labels, got none")
        with torch.enable_grad():  # as in training, where it may differentiate
            _check_objective(learner.objective, scores, Batch(x, batch_y), x)


def _called(name: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        shapes = ", ".join(str(tuple(a.shape)) for a in arguments if isinstance(a, Tensor))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{name}: wanted one that takes tensors of shape {shapes}, got {reason}") from error


def _check_tensor(name: str, what: str, value: Any, shape: tuple[int, ...]) -> None:
    """`shape` may be the beginning of the shape, for scores."""
    if not isinstance(value, Tensor):
        raise UserError(f"{name}: wanted {what} as a torch.Tensor, got {type(value).__name__}")
    fits = tuple(value.shape[: len(shape)]) == shape and (len(shape) == 1 or value.dim() == len(shape))
    if not fits or not value.is_floating_point():
        wanted = "(B,) or (B, 1, ...)" if len(shape) == 1 else f"(B, {', '.join(map(str, shape[1:]))})"
        raise UserError(
            f"{name}: wanted floating-point {what} of shape {wanted}, got {value.dtype} of shape "
            f"{tuple(value.shape)} for a batch of {shape[0]}"
        )
    if not value.isfinite().all():
        raise UserError(f"{name}: wanted finite {what}, got NaN or infinity")


def _check_objective(what: Objective, scores: Tensor, batch: Batch, fake: Tensor) -> None:
    real_scores, fake_scores = (scores.detach().clone().requires_grad_() for _ in range(2))
    try:
        found = what.critic(real_scores, fake_scores, batch, fake)
        of_generator = what.generator(fake_scores, real_scores if what.needs_real else None)
        losses = {"critic": found.loss, "generator": of_generator}
        terms = dict(found.terms)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"objective: wanted one for scores of shape {tuple(scores.shape)}, got {reason}") from error
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.dim():
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"objective: wanted a scalar tensor as the {name}'s loss, got {shape}")
        if not loss.requires_grad:
            raise UserError(
                f"objective: wanted the {name}'s loss as a function of the scores, got one without a gradient"
            )
    for name, term in terms.items():
        if name in RESERVED or not isinstance(term, Tensor) or term.numel() != 1:
            raise UserError(
                f"objective: wanted terms that are scalar tensors and not called {', '.join(sorted(RESERVED))}, "
                f"got {name!r}"
            )
