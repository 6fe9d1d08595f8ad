"""Every setting of a training run, one field each; the command line makes a flag of every field."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from gpkernels.errors import UserError
from gpkernels.kinds import KINDS
from gpkernels.latents import LATENTS
from gpkernels.losses.sensitive import FAMILY
from gpkernels.losses.table import LOSSES as FRAMEWORK
from gpkernels.ops.grad_penalty.penalties import PENALTIES
from gpkernels.ops.grad_penalty.reference import AXES, NORMS
from gpkernels.ops.perturb.reference import NOISES

GENERATORS = ("dcgan", "resnet", "resnet-wgan-gp")
CRITICS = ("dcgan", "cost-model", "resnet", "resnet-wgan-gp")
CRITIC_NORMS = ("none", "batch", "layer", "instance")
CONDITIONS = ("none", "concat", "projection", "classes")
IMAGE_SIZES = (32, 64, 128)
LOSSES = (*FAMILY, *FRAMEWORK)
PENALTY_KINDS = ("none", *KINDS, "r1+r2")
OPTIMIZERS = ("adam", "rmsprop")
CROPS = ("178", "148", "140", "128", "108", "none")
SPLITS = ("train", "valid", "test", "all")
PRECISIONS = ("fp32", "bf16", "fp16")
CHANGEABLE = {
    *("epochs", "steps", "device", "log_every", "data", "cache", "accumulate", "sync_batchnorm"),
    *("checkpoint_minutes", "keep"),
}
"""Settings with which a run may go on that differ from those it was started with."""


def _setting(default: Any, doc: str, *, choices: tuple[str, ...] | None = None, minimum: float | None = None) -> Any:
    return field(default=default, metadata={"help": doc, "choices": choices, "minimum": minimum})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of the reference trainer. The defaults are LS-GAN-PG with the settings of its public code."""

    preset: str = _setting("ls-gan-pg", "name of the preset the other settings start from")
    data: str = _setting(
        "lfw-mini",
        "lfw-mini, fashion-mnist[:PATH], folder:PATH (a folder or .zip) or celeba:PATH (torchvision's or Kaggle's "
        "folders, parquet files, a folder of the images, .zip)",
    )
    image_size: int | None = _setting(
        None, "side of the square images: 32, 64 or 128 (default: 32 for lfw-mini and fashion-mnist, else 64)"
    )
    label_attribute: str | None = _setting(
        None, "celeba: the attribute that is the label, such as Smiling (default: no labels)"
    )
    labels: int | None = _setting(
        None,
        "condition classes: train with the labels of this many images, equally many of each class, which make half of "
        "each batch (default: all)",
        minimum=1,
    )
    crop: str = _setting("178", "celeba: side of the crop before resizing, in pixels", choices=CROPS)
    split: str = _setting("train", "celeba: the official part to train on", choices=SPLITS)
    max_images: int | None = _setting(None, "use only the first this many images (default: all)", minimum=1)
    cache: str | None = _setting(None, "folder of prepared images (default: $GPKERNELS_CACHE, else ~/.cache/gpkernels)")
    flip: bool = _setting(True, "mirror images at random")
    shift: int | None = _setting(
        None, "shift images at random by up to this many pixels (default: 1 for lfw-mini, else 0)", minimum=0
    )

    loss: str = _setting("ls-gan", "the adversarial loss (gpkernels losses lists them)", choices=LOSSES)
    epsilon: float = _setting(1.0, "weight of the critic's real term f: imbalanced losses; 1 for ls-gan and its like")
    slope: float = _setting(0.0, "gls-gan: nu of the cost max(a, nu a); 0 is LS-GAN, 1 is WGAN, -1 is |a|")
    margin: float = _setting(2e-4, "ls-gan and its like: lambda of the margin lambda * ||x - G(z)||_1", minimum=0)
    gamma: float = _setting(0.0, "ls-gan and its like: weight of the real samples' own loss E L(x)", minimum=0)
    unlabelled_weight: float = _setting(
        1.0, "cls-gan with --labels: weight of a pair whose label is the critic's own guess", minimum=0
    )
    unlabelled_confidence: float = _setting(
        0.95, "cls-gan with --labels: the least probability of a guess that counts; 0 to 1", minimum=0
    )
    penalty: str = _setting("ls_gan_pg", "kind of gradient penalty", choices=PENALTY_KINDS)
    penalty_weight: float = _setting(10.0, "weight of the gradient penalty", minimum=0)
    penalty_form: str | None = _setting(
        None,
        "R(n) of the penalty (default: the kind's usual one; that of r1 and r2 is half of squared, so that squared "
        "itself doubles them)",
        choices=tuple(PENALTIES),
    )
    penalty_target: float = _setting(1.0, "k of the forms that compare the norm with one", minimum=0)
    penalty_norm: str = _setting("l2", "norm of the gradient", choices=NORMS)
    penalty_axes: str | None = _setting(
        None,
        "what the gradient's norm runs over (default: pixel for ls_gan_pg, as in its public code, else sample)",
        choices=AXES,
    )
    penalty_norm_eps: float = _setting(
        0.0, "norm l2: e of the norm sqrt(e + sum g^2), as some public code has it", minimum=0
    )
    penalty_per_element: bool = _setting(
        False, "coupled: weigh real against fake anew for each element, as some public code does, not for each image"
    )
    penalty_noise: str | None = _setting(
        None,
        "local: uniform, U(-1, 1) times standard deviations of the images, or normal, N(0, 1) (default: uniform)",
        choices=NOISES,
    )
    penalty_scale: float | None = _setting(
        None, "local: size of the noise (default: 0.5 for uniform noise; to be given for normal)", minimum=0
    )
    penalty_interval: int = _setting(1, "lazy regularisation: penalise every this many steps", minimum=1)

    generator: str = _setting(
        "dcgan", "generator: dcgan, resnet (SNGAN's) or resnet-wgan-gp (its 128 pixels: our own)", choices=GENERATORS
    )
    critic: str = _setting(
        "dcgan",
        "critic: dcgan, cost-model (BN + ReLU between five convolutions), resnet (SNGAN's) or resnet-wgan-gp",
        choices=CRITICS,
    )
    critic_norm: str = _setting(
        "none", "norm between the critic's layers; cost-model has its own", choices=CRITIC_NORMS
    )
    condition: str = _setting(
        "none",
        "how nets use the labels: concat (beside z and image), projection (with class-conditional BN in the "
        "generator) or classes (the critic gives a loss for each class: CLS-GAN)",
        choices=CONDITIONS,
    )
    spectral_norm: bool = _setting(
        False, "divide every weight of the critic by its spectral norm, with or without a penalty"
    )
    clip: float | None = _setting(
        None, "clip the critic's weights to [-c, c] after each of its updates (the first WGAN; default: no)", minimum=0
    )
    nz: int = _setting(100, "size of the latent vector z", minimum=1)
    z: str = _setting("normal", "distribution of z: N(0, 1) or U(-1, 1)", choices=tuple(LATENTS))
    fresh_z: bool = _setting(
        False, "draw new z for the generator's update (default: that of the critic's last one, one forward less)"
    )
    ngf: int = _setting(64, "width of the generator", minimum=1)
    ndf: int = _setting(64, "width of the critic", minimum=1)
    ema: float = _setting(0.999, "decay of the generator's moving average, from which samples are drawn", minimum=0)

    batch_size: int = _setting(64, "images a step", minimum=2)
    epochs: int = _setting(25, "passes over the data (an epoch of lfw-mini is 32 passes)", minimum=1)
    steps: int | None = _setting(None, "stop after this many steps (default: --epochs decides)", minimum=1)
    critic_steps: int = _setting(
        1, "updates of the critic for one of the generator, each on images of its own", minimum=1
    )
    optimizer: str = _setting("adam", "optimizer of both nets", choices=OPTIMIZERS)
    lr: float = _setting(2e-4, "learning rate", minimum=0)
    critic_lr: float | None = _setting(None, "learning rate of the critic (default: as --lr)", minimum=0)
    beta1: float = _setting(0.5, "Adam's beta1", minimum=0)
    beta2: float = _setting(0.999, "Adam's beta2", minimum=0)
    seed: int = _setting(0, "seed of everything random; a seeded run repeats bit for bit on the CPU", minimum=0)
    device: str = _setting("auto", "auto (cuda where there is one), cpu, cuda, cuda:1, ...")
    channels_last: bool = _setting(True, "keep images and weights in channels_last memory, which is faster")
    precision: str = _setting(
        "fp32",
        "numbers that the nets compute in, by autocast; weights, losses and penalties stay fp32, fp16 scales gradients",
        choices=PRECISIONS,
    )
    accumulate: int = _setting(
        1,
        "compute each batch in this many equal parts and add their gradients: less memory, the same step, but that "
        "BatchNorm sees a part at a time",
        minimum=1,
    )
    sync_batchnorm: bool = _setting(
        True,
        "several processes: BatchNorm's statistics are those of the whole batch; else those of each process's part, "
        "and the running ones that are saved are the first process's",
    )
    cuda_graph: bool = _setting(False, "run each step as one CUDA graph, which small nets on a GPU gain from")
    log_every: int = _setting(10, "steps between lines of the log", minimum=1)
    checkpoint_minutes: float = _setting(
        10.0, "minutes between checkpoints within an epoch, each epoch ends with one; 0: after every step", minimum=0
    )
    keep: int = _setting(2, "how many checkpoints stay in the run folder, the newest", minimum=1)

    def __post_init__(self) -> None:
        for name, spec in settings().items():
            value = getattr(self, name)
            if value is None:
                continue
            choices, minimum = spec.metadata["choices"], spec.metadata["minimum"]
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{flag(name)}: wanted a finite number, got {value}")
            if choices is not None and value not in choices:
                raise UserError(f"{flag(name)}: wanted one of {', '.join(choices)}, got {value!r}")
            if minimum is not None and value < minimum:
                raise UserError(f"{flag(name)}: wanted at least {minimum:g}, got {value}")
        if self.image_size not in (None, *IMAGE_SIZES):
            raise UserError(f"--image-size: wanted 32, 64 or 128, got {self.image_size}")
        if self.critic == "cost-model" and self.critic_norm != "none":
            raise UserError(f"--critic-norm: wanted none for cost-model, which has BatchNorm, got {self.critic_norm}")
        if self.labels is not None and self.condition != "classes":
            raise UserError(f"--labels: wanted --condition classes, which can do without labels, got {self.condition}")
        if self.label_attribute is not None and not self.data.startswith("celeba:"):
            raise UserError(f"--label-attribute: wanted --data celeba:PATH, got {self.data}")
        if self.unlabelled_confidence > 1:
            raise UserError(f"--unlabelled-confidence: wanted at most 1, got {self.unlabelled_confidence:g}")
        if self.seed >= 2**31:
            raise UserError(f"--seed: wanted a number below 2**31, got {self.seed}")
        self._check_loss()
        if self.penalty_interval > 1 and self.optimizer != "adam":
            raise UserError(f"--penalty-interval: wanted 1 for optimizer {self.optimizer}, got {self.penalty_interval}")
        self._check_around()
        self._check_scale()
        for name in ("beta1", "beta2", "ema"):
            if getattr(self, name) >= 1:
                raise UserError(f"{flag(name)}: wanted a number below 1, got {getattr(self, name):g}")

    def _check_around(self) -> None:
        for name in ("penalty_noise", "penalty_scale"):
            if getattr(self, name) is not None and self.penalty != "local":
                raise UserError(f"{flag(name)}: wanted --penalty local, which draws noise, got {self.penalty}")
        if self.penalty_noise == "normal" and self.penalty_scale is None:
            raise UserError("--penalty-scale: wanted a number for --penalty-noise normal, got none")
        if self.penalty_per_element and self.penalty != "coupled":
            raise UserError(f"--penalty-per-element: wanted --penalty coupled, which weighs pairs, got {self.penalty}")
        if self.penalty_norm_eps and self.penalty_norm != "l2":
            raise UserError(f"--penalty-norm-eps: wanted --penalty-norm l2, which has a root, got {self.penalty_norm}")

    def _check_loss(self) -> None:
        sensitive = self.loss in FAMILY
        if self.slope > 1:
            raise UserError(f"--slope: wanted a number <= 1, got {self.slope:g}")
        if self.slope != 0 and self.loss != "gls-gan":
            raise UserError(f"--slope: wanted 0 for loss {self.loss!r} (only gls-gan has a slope), got {self.slope:g}")
        if not self.epsilon > 0:
            raise UserError(f"--epsilon: wanted a number > 0, got {self.epsilon:g}")
        if self.epsilon != 1 and (sensitive or FRAMEWORK[self.loss].needs_real):
            raise UserError(f"--epsilon: wanted 1 for loss {self.loss!r}, got {self.epsilon:g}")
        if self.gamma != 0 and not sensitive:
            raise UserError(f"--gamma: wanted 0 for loss {self.loss!r} (only ls-gan and its like), got {self.gamma:g}")
        if self.loss == "cls-gan" and self.condition != "classes":
            raise UserError(f"--condition: wanted classes for loss 'cls-gan', got {self.condition}")
        if self.condition == "classes" and not sensitive:
            raise UserError(f"--loss: wanted {', '.join(FAMILY)} for condition classes, got {self.loss!r}")

    def _check_scale(self) -> None:
        if self.batch_size % self.accumulate:
            raise UserError(f"--accumulate: wanted a divisor of --batch-size {self.batch_size}, got {self.accumulate}")
        if not self.cuda_graph:
            return
        if self.device == "cpu":
            raise UserError("--cuda-graph: wanted a GPU, got --device cpu")
        if self.precision == "fp16":
            raise UserError("--cuda-graph: wanted --precision fp32 or bf16, whose step reads nothing back, got fp16")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        unknown = sorted(set(values) - set(settings()))
        if unknown:
            raise UserError(f"config: wanted settings of this version, got unknown ones: {', '.join(unknown)}")
        return cls(**values)


def settings() -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(TrainConfig)}


def check_unchanged(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError if a setting of `now` is not that of `then`, with which a run was trained so far, unless runs
    may go on with another. What `then` lacks had its default."""
    for name, value in now.items():
        before = then.get(name, settings()[name].default)
        if name not in CHANGEABLE and before != value:
            raise UserError(f"{flag(name)}: wanted {before}, as the checkpoint was trained, got {value}")


def setting_types() -> dict[str, type]:
    """The type of each setting's value, None left out."""
    hints = typing.get_type_hints(TrainConfig)
    return {
        name: next(t for t in typing.get_args(hint) if t is not type(None))
        if isinstance(hint, types.UnionType)
        else hint
        for name, hint in hints.items()
    }


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flag(parser: Any, name: str, **changed: Any) -> None:
    """Adds the flag of a setting to a parser, or a group of one; `changed` are arguments of `add_argument`.

    A flag that is not given leaves no value behind: a preset, a file or a resumed run decides there.
    """
    spec, kind = settings()[name], setting_types()[name]
    choices = spec.metadata["choices"]
    text = spec.metadata["help"] + ("" if spec.default is None else f" (default: {spec.default})")
    arguments: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind is bool:
        arguments["action"] = argparse.BooleanOptionalAction
    else:
        arguments |= {"type": kind, "metavar": "|".join(choices) if choices else kind.__name__.upper()}
    parser.add_argument(flag(name), **{**arguments, **changed})
