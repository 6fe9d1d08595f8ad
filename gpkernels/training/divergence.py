"""Numbers that are not finite: a run that meets one stops, and takes its last steps once more to find the first.

The steps since the last checkpoint are repeated with hooks on every layer and on the optimizers. On a CPU a repeated
step has the same bits; where the repetition stays finite, the message says so.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
    """Raises NotFinite for the first parameter or buffer that is not finite."""
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
    if trainer.processes.count > 1 or trainer.config.cuda_graph:
        how = "in one process and without --cuda-graph the layer it comes from is found"
        return f"training diverged: {found}; {_kept(trainer.out, state)}; {how}"
    checkpoint.say(f"{found}: steps {state['step'] + 1} to {failed} are repeated to find the layer it comes from")
    trainer.load_state_dict(state)
    with Watch({name: getattr(trainer, name) for name in _NETS}, trainer.optimizers) as watch:
        while (first := watch.step(trainer.train_step)) is None and trainer.step < failed:
            pass
    if first is None:
        told = "the same steps once more had finite terms, gradients and weights"
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


@dataclass
class _Call:
    """A call of a layer, and those within it."""

    name: str
    layer: nn.Module
    finite_input: bool
    finite_output: bool = True
    inner: list[_Call] = field(default_factory=list)

    def broken(self) -> Iterator[_Call]:
        """The calls, this one among them, that gave something not finite."""
        if not self.finite_output:
            yield self
        for call in self.inner:
            yield from call.broken()

    def origin(self, usual: set[str]) -> _Call:
        """The innermost call that made what is not finite of what was; those of `usual` layers always do."""
        for call in self.inner:
            if call.finite_input and not call.finite_output and call.name not in usual:
                return call.origin(usual)
        return self

    def __str__(self) -> str:
        weight = next((key for key, value in self.layer.named_parameters() if not _finite(value)), None)
        cause = "from finite input" if self.finite_input else "from such input"
        cause = cause if weight is None else f"whose {weight} is not finite"
        return f"the output of {self.name} ({type(self.layer).__name__}), {cause}"


class Watch:
    """Within it, `step` takes a step and says what in it first was not finite.

    `inputs` holds, of the last step, what each net was called with, in order: (net, tensors on the CPU). So of a
    generator its latent vectors and labels; of a critic the images, and where a penalty took its gradient.
    """

    def __init__(self, nets: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.nets, self.optimizers = nets, optimizers
        self.inputs: list[tuple[str, list[Tensor]]] = []
        self._open: list[_Call] = []
        self._usual: set[str] = set()  # layers whose infinities are no failure, such as masks of attention
        self._first: _Call | str | None = None
        self._net = ""  # whose gradient it is, where _first is one
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for net, module in self.nets.items():
            for name, layer in module.named_modules(prefix=net):
                self._handles.append(layer.register_forward_pre_hook(self._begin(name), with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._end))
            self._handles.append(self.optimizers[net].register_step_pre_hook(self._gradients(net)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()

    def step(self, train_step: Callable[[], Mapping[str, Tensor]]) -> str | None:
        """Where the numbers of the step stop being finite, if its terms, gradients or weights are not."""
        self.inputs.clear()
        self._first = None
        terms = {name: value.item() for name, value in train_step().items()}
        bad = {name: value for name, value in terms.items() if not math.isfinite(value)}
        weight = next((name for name, value in _weights(self.nets) if not _finite(value)), None)
        if not bad and weight is None:
            return None
        if isinstance(self._first, _Call):
            return str(self._first)
        if self._first is not None:  # where the loss that the gradient is of is not finite, it was first
            bad = {
                name: value for name, value in bad.items() if (name == "generator_loss") == (self._net == "generator")
            }
        if bad:
            name = "penalty" if "penalty" in bad else next(iter(bad))
            return f"{name} itself, {bad[name]} of finite outputs"
        return self._first or f"{weight}, moved by its optimizer with a finite gradient"

    def _begin(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            given = _tensors((args, kwargs))
            if not self._open:
                self.inputs.append((name, [value.detach().cpu().clone() for value in given]))
            self._open.append(_Call(name, layer, all(map(_finite, given))))

        return hook

    def _end(self, layer: nn.Module, args: Any, output: Any) -> None:
        call = self._open.pop()
        call.finite_output = all(map(_finite, _tensors(output)))
        if self._open:
            self._open[-1].inner.append(call)
        elif call.finite_output:
            self._usual |= {inner.name for inner in call.broken()}
        elif self._first is None:
            self._first = call.origin(self._usual)

    def _gradients(self, net: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            named = [(name, value.grad) for name, value in self.nets[net].named_parameters(prefix=net)]
            bad = [name for name, grad in named if grad is not None and not _finite(grad)]
            if bad and self._first is None:  # going backwards it met the last of them first
                self._first = f"the gradient of {bad[-1]}, of {len(bad)} that are not finite the last, of a finite loss"
                self._net = net

        return hook


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
