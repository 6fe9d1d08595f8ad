"""TensorBoard and other trackers, through Accelerate's classes for them.

A resumed run goes on in the tracker's own run, and no step is shown twice: TensorBoard hides what was written after
the checkpoint, to the others no step is told again. For this a run folder holds trackers.json.
"""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from gpkernels.errors import UserError
from gpkernels.training import pictures
from gpkernels.training.callbacks.base import Callback
from gpkernels.training.disk import write_atomically

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer

NAME = "trackers.json"
PROJECT = "gpkernels"


class Session(NamedTuple):
    """A run from its start or a resume on; `identity` is the tracker's name for it, None if it has none yet."""

    out: Path
    step: int
    identity: str | None


class Service(NamedTuple):
    """What is particular to a tracker."""

    options: Callable[[Session], dict[str, Any]] = lambda session: {}
    """Arguments of its class in Accelerate, beside the project and the folder."""
    identity: Callable[[Any], str | None] = lambda tracker: None
    """Of a started tracker: what `options` needs to go on with its run."""
    picture: Callable[[Image.Image], tuple[Any, dict[str, Any]]] | None = None
    """A picture as its `log_images` takes it, and further arguments; None for a tracker that is shown none."""
    project: str = PROJECT
    forgets: bool = False
    """Whether it drops by itself, when a run is resumed, the steps after the checkpoint."""


def _listed(image: Image.Image) -> tuple[Any, dict[str, Any]]:
    return [image], {}


def _nhwc(image: Image.Image) -> tuple[Any, dict[str, Any]]:
    array = np.asarray(image)
    return array.reshape(1, *array.shape[:2], -1), {"dataformats": "NHWC"}


SERVICES: Mapping[str, Service] = MappingProxyType(
    {
        "tensorboard": Service(
            lambda session: {"purge_step": session.step + 1}, picture=_nhwc, project="tensorboard", forgets=True
        ),
        "wandb": Service(
            lambda session: {
                "name": session.out.name,
                "dir": session.out,
                "id": session.identity or uuid.uuid4().hex[:12],
                "resume": "allow",
            },
            identity=lambda tracker: tracker.tracker.id,
            picture=_listed,
        ),
        "mlflow": Service(
            lambda session: {"run_name": session.out.name, "run_id": session.identity},
            identity=lambda tracker: tracker.tracker.info.run_id,
        ),
        "aim": Service(
            lambda session: {"run_hash": session.identity},
            identity=lambda tracker: tracker.tracker.hash,
            picture=lambda image: (image, {}),
        ),
        "swanlab": Service(picture=_listed),
    }
)
"""A tracker whose row has no `identity`, or that has no row, starts a run of its own at each resume."""

_GROUPS = {
    "loss": ("critic_loss", "generator_loss", "penalty"),
    "critic": ("score_real", "score_fake", "gap", "margin", "grad_norm", "grad_norm_max", "classification_error"),
    "weights": ("critic_weight_grad", "generator_weight_grad"),
    "speed": ("images_per_second", "input_share"),
}
_TAGS = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names}


def usual() -> tuple[str, ...]:
    """("tensorboard",) where it and Accelerate are installed, else ()."""
    try:
        check(("tensorboard",))
    except UserError:
        return ()
    return ("tensorboard",)


def check(names: tuple[str, ...]) -> None:
    """Raises UserError for a tracker that Accelerate does not know or that is not installed."""
    if not names:
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType
    except ImportError:
        raise UserError("--tracker: wanted accelerate installed: pip install 'gpkernels[train]'") from None
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"--tracker: wanted none or some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, got {name!r}"
            )
        if name in LoggerType.list() and name not in map(str, get_available_trackers()):
            raise UserError(f"--tracker: wanted {name} installed (pip install {name.replace('_', '-')}), got none")


def used_before(out: Path) -> tuple[str, ...] | None:
    """The trackers of the run in `out`, which may be none; None where no run has said."""
    file = out / NAME
    return tuple(json.loads(file.read_text())) if file.is_file() else None


class Trackers(Callback):
    """Tells trackers, by their names in Accelerate, each line of the log and each epoch's samples.

    TensorBoard writes into the run folder. A tracker that fails while training is dropped with a warning; the run
    goes on. Raises UserError for an unknown one, one that is not installed, and one that does not start.
    """

    def __init__(self, *names: str) -> None:
        check(names)
        self.names = names
        self._running: dict[str, Any] = {}
        self._state: dict[str, dict[str, Any]] = {}
        self._told: dict[str, int] = {}

    def on_start(self, trainer: Trainer) -> None:
        file = trainer.out / NAME
        before = json.loads(file.read_text()) if file.is_file() else {}
        for name in self.names:
            known = before.get(name, {})
            self._told[name] = known.get("step", 0)
            session = Session(trainer.out, trainer.step, known.get("identity"))
            tracker = self._running[name] = _start(name, session)
            identity = SERVICES.get(name, Service()).identity(tracker)
            self._state[name] = {"identity": identity, "step": self._told[name]}
            if name not in before:
                values = {key: value for key, value in trainer.config.to_dict().items() if value is not None}
                self._try(name, "store_init_configuration", values)
        self._keep(trainer)

    def on_log(self, trainer: Trainer, record: dict[str, Any]) -> None:
        values = {_TAGS.get(key, f"more/{key}"): value for key, value in record.items() if key not in ("step", "epoch")}
        for name in self._to_tell(trainer):
            self._try(name, "log", values, step=trainer.step)

    def on_epoch(self, trainer: Trainer, epoch: int) -> None:
        grid = pictures.grid(trainer.sample(trainer.fixed_z))
        for name in self._to_tell(trainer):
            picture = SERVICES.get(name, Service()).picture
            if picture is not None:
                value, more = picture(grid)
                self._try(name, "log_images", {"samples": value}, step=trainer.step, **more)

    def on_close(self, trainer: Trainer) -> None:
        for name in tuple(self._running):
            self._try(name, "finish")
            self._running.pop(name, None)

    def _to_tell(self, trainer: Trainer) -> list[str]:
        """The trackers that have not heard of this step before a resume; that they now have is kept first."""
        names = [name for name in self._running if trainer.step > self._told[name]]
        late = [name for name in names if not SERVICES.get(name, Service()).forgets]
        if any(self._state[name]["step"] < trainer.step for name in late):
            for name in late:
                self._state[name]["step"] = trainer.step
            self._keep(trainer)
        return names

    def _keep(self, trainer: Trainer) -> None:
        write_atomically(trainer.out / NAME, lambda file: file.write(json.dumps(self._state, indent=2).encode()))

    def _try(self, name: str, method: str, *what: Any, **more: Any) -> None:
        try:
            getattr(self._running[name], method)(*what, **more)
        except Exception as error:
            del self._running[name]
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"tracker {name} failed and is told no more: {reason}", RuntimeWarning, stacklevel=2)


def _start(name: str, session: Session) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # Accelerate's trackers log through it
    kind, service = LOGGER_TYPE_TO_CLASS[name], SERVICES.get(name, Service())
    where = (session.out,) if kind.requires_logging_directory else ()
    try:
        tracker = kind(service.project, *where, **service.options(session))
        if hasattr(tracker, "start"):  # earlier Accelerate starts in the constructor
            tracker.start()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--tracker {name}: wanted one that starts, got {reason}") from error
    return tracker
