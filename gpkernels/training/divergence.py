"""Numbers that are not finite: a run that meets one stops, and its last steps are gone through again to find the first.

The steps since the last checkpoint are repeated with hooks on every layer and on the optimizers. On a CPU a repeated step
has the same bits; where the repetition stays finite, the message says so.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpkernels.errors import UserError
from gpkernels.training import checkpoint, disk

if TYPE_CHECKING:
    from gpkernels.training.loop import Trainer

NAME = "diverged.pt"
_NETS = ("generator", "critic")


class NotFinite(Exception):
    """`name`, a term of the log or a weight, is `value` after step `step`."""

    def __init__(self, name: str, value: float, step: int) -> None:
        super().__init__(f"{name} is {value} at step {step}")


def check_terms(terms: Mapping[str, float], step: int) -> None:
    """Raises NotFinite for the first number that is not."""
    for name, value in terms.items():
        if not math.isfinite(value):
            raise NotFinite(name, value, step)


def check_weights(nets: Mapping[str, nn.Module], step: int) -> None:
    """Raises NotFinite for the first parameter or buffer that is not finite, so that no checkpoint holds one."""
    for name, value in _weights(nets):
        if not _finite(value):
            raise NotFinite(name, value[~value.isfinite()].flatten()[0].item(), step)


def explain(trainer: Trainer, found: NotFinite) -> str:
    """What to say of a run that stopped for `found`: where it began, where its batch is, what is kept.

    Leaves `trainer` at its last checkpoint.
    """
    failed = trainer.step
    try:
        state = checkpoint.load(trainer.out)
    except UserError:
        return f"training diverged: {found} (try a lower --lr)"
    if state["step"] >= failed:
        return f"training diverged: {found}; {_kept(trainer.out, state)}"
    checkpoint.say(f"{found}: steps {state['step'] + 1} to {failed} are repeated to find the layer it comes from")
    trainer.load_state_dict(state)
    with Watch({name: getattr(trainer, name) for name in _NETS}, trainer.optimizers) as watch:
        while (first := watch.step(trainer.train_step)) is None and trainer.step < failed:
            pass
    if first is None:
        told = "the same steps once more stayed finite, so it was chance, or not the training"
    else:
        dump = {"step": trainer.step, "seed": trainer.config.seed, "first": first, "inputs": watch.inputs}
        told = f"first, in step {trainer.step}: {first}; {_dump(trainer.out / NAME, dump)}"
    trainer.load_state_dict(state)
    return f"training diverged: {found}; {told}; {_kept(trainer.out, state)}"


def _dump(path: Path, what: dict[str, Any]) -> str:
    buffer = io.BytesIO()
    torch.save(what, buffer)
    try:
        disk.write_atomically(path, lambda file: file.write(buffer.getbuffer()))
    except OSError as error:
        return f"its batch could not be saved ({error.strerror})"
    return f"what the nets were given in that step is in {path}"


def _kept(out: Path, state: dict[str, Any]) -> str:
    return f"the checkpoint of step {state['step']} is kept in {out} (try a lower --lr)"


class Watch:
    """Within it, `step` takes a step and says what in it first was not finite.

    `inputs` holds, of the last step, what each net was called with, in order: (net, tensors on the CPU). So of a
    generator its latent vectors and labels; of a critic the images, and the points at which a penalty took its gradient.
    """

    def __init__(self, nets: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.nets, self.optimizers = nets, optimizers
        self.inputs: list[tuple[str, list[Tensor]]] = []
        self._first: tuple[str, str] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for net, module in self.nets.items():
            self._handles.append(module.register_forward_pre_hook(self._called(net), with_kwargs=True))
            for name, layer in module.named_modules(prefix=net):
                self._handles.append(layer.register_forward_hook(self._output(net, name), with_kwargs=True))
            self._handles.append(self.optimizers[net].register_step_pre_hook(self._gradients(net)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()

    def step(self, train_step: Callable[[], Mapping[str, Tensor]]) -> str | None:
        """Where the numbers of the step stop being finite, if its terms, gradients or weights are not.

        A layer whose output is not finite is no failure by itself: an attention mask is made of infinities.
        """
        self.inputs.clear()
        self._first = None
        terms = {name: value.item() for name, value in train_step().items()}
        bad = {name: value for name, value in terms.items() if not math.isfinite(value)}
        weight = next((name for name, value in _weights(self.nets) if not _finite(value)), None)
        if self._first is None:
            if bad:
                return _of_terms(bad)
            return None if weight is None else f"{weight}, moved by its optimizer with a finite gradient"
        kind, text = self._first
        if kind == "output":
            return text if bad or weight else None
        own = {name: value for name, value in bad.items() if (name == "generator_loss") == (kind == "generator")}
        return _of_terms(own) if own else text

    def _called(self, net: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inputs.append((net, [value.detach().cpu().clone() for value in _tensors((args, kwargs))]))

        return hook

    def _output(self, net: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._first is not None or all(map(_finite, _tensors(output))):
                return
            weights = [key for key, value in module.named_parameters() if not _finite(value)]
            if weights:
                cause = f"whose {weights[0]} is not finite"
            else:
                cause = "from finite input" if all(map(_finite, _tensors((args, kwargs)))) else "from such input"
            self._first = "output", f"the output of {name} ({type(module).__name__}), {cause}"

        return hook

    def _gradients(self, net: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            if self._first is not None:
                return
            named = [(name, value.grad) for name, value in self.nets[net].named_parameters(prefix=net)]
            bad = [name for name, grad in named if grad is not None and not _finite(grad)]
            if bad:  # going backwards it met the last of them first
                self._first = net, f"the gradient of {bad[-1]}, of {len(bad)} that are not finite the last, of a finite loss"

        return hook


def _of_terms(bad: Mapping[str, float]) -> str:
    name = "penalty" if "penalty" in bad else next(iter(bad))
    return f"{name} itself, {bad[name]} of finite outputs"


def _weights(nets: Mapping[str, nn.Module]) -> Iterable[tuple[str, Tensor]]:
    for net, module in nets.items():
        for name, value in module.state_dict(prefix=f"{net}.").items():
            if isinstance(value, Tensor):
                yield name, value


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.detach().isfinite().all())


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for part in value for found in _tensors(part)] if isinstance(value, (tuple, list)) else []
