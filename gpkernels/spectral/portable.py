"""What the parametrizations share: they find their weight, are read without detours, keep float32 buffers, copy and
pickle with their module."""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.spectral import steps

if TYPE_CHECKING:
    from gpkernels.spectral.results import Update

State = tuple[tuple[int, ...], tuple[int, ...]]
"""What a normalised weight is a function of: ids and addresses of the weight and the vectors, and their versions."""


def vectors_of(state: State) -> State:
    """The part that says which vectors, and what they hold."""
    return state[0][2:], state[1][1:]


class Known:
    """What is known beside the buffers: a plain object, whose attributes cost a tenth of a module's.

    owner: the list of parametrizations.
    fresh: no update or load has moved the vectors since the layer was registered: they are a function of the weight.
    copied: the layer is a copy or unpickled: perhaps an average.
    at: the time of the last update.
    state: the marks that the last update, or the registration, left; `held` keeps their memory from being used anew,
        which would make other contents look the same.
    update, index: the update that left `state`, if one did, and which of its layers this is.
    results: of other reads, by whether they have gradients.
    spent: sigma of the last read that nothing was known for.
    unhooked: the next hook's number when the layer was last found to be without hooks.
    """

    __slots__ = (
        "at",
        "copied",
        "fresh",
        "held",
        "index",
        "owner",
        "results",
        "spent",
        "state",
        "unhooked",
        "update",
    )

    def __init__(self, owner: ParametrizationList | None = None, fresh: bool = False, copied: bool = False) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.fresh, self.copied, self.at = fresh, copied, 0
        self.spent: Tensor | None
        self.update: Update | None = None
        self.index, self.unhooked = 0, -1
        self.results: dict[bool, Any] = {}
        self.forget()

    @property
    def mark(self) -> steps.Mark | None:
        if self.state is None:
            return None
        addresses, versions = self.state
        return addresses[0], addresses[1], versions[0]

    @property
    def sigma(self) -> Tensor:
        """Of the last update, as a view."""
        assert self.update is not None
        sigma, at = self.update.place(self.index)
        return sigma[at]

    def keep(self, state: State | None, held: Any) -> None:
        self.state, self.held, self.spent = state, held, None
        self.drop()
        self.update = None

    def drop(self) -> None:
        """Lets go of what reads would have shared."""
        self.results.clear()
        if self.update is not None:
            self.update.drop(self.index)

    def forget(self) -> None:
        """The weight has changed, perhaps with its version unmoved, and u and v have not."""
        self.keep(None, None)


class Owned(nn.Module, ABC):
    """A parametrization that knows the list it is in, without keeping it alive, and so the weight."""

    vectors: ClassVar[tuple[str, ...]] = ()
    """The buffers of a normalisation, kept in the accumulation dtype of the weight."""
    at_reads: bool
    """Whether the vectors move when torch's do."""

    def __init__(self) -> None:
        super().__init__()
        self.known = Known()

    def attach(self, owner: ParametrizationList) -> None:
        self.known = Known(owner, fresh=True)
        weight = self.original()
        if weight is not None:
            self.remember(weight)

    def original(self) -> Tensor | None:
        """The weight, where this is the first parametrization of it."""
        reference = self.known.owner
        owner = None if reference is None else reference()
        if owner is None or owner._modules.get("0") is not self:
            return None
        weight = owner._parameters.get("original")
        return owner._buffers.get("original") if weight is None else weight

    def state(self, weight: Tensor, moved: int = 0) -> State | None:
        """None with inference tensors, which have no version. moved=1: as it will be after a call that moves the
        vectors."""
        tensors: Any = (weight, *[self._buffers[name] for name in self.vectors])
        try:
            first, *others = [x._version for x in tensors]
        except RuntimeError:
            return None
        versions = first, *[n + moved for n in others]
        return tuple([n for x in tensors for n in (id(x), x.data_ptr())]), versions

    def remember(self, weight: Tensor, moved: int = 0) -> None:
        """Keeps the state of weight and vectors: see `state`."""
        known, state = self.known, self.state(weight, moved)
        held, before = known.held, known.state
        if held is None or before is None or state is None or before[0] != state[0]:
            held = weight.detach(), [self._buffers[name] for name in self.vectors]
        known.keep(state, held)

    @abstractmethod
    def read(self, weight: Tensor) -> Tensor:
        """The normalised weight, outside of compilers."""

    @abstractmethod
    def restart(self, weight: Tensor) -> None:
        """The vectors of a weight that has nothing to do with the old one."""

    def fit(self, weight: Tensor) -> None:
        dtype = accumulation_dtype(weight.dtype)
        for name in self.vectors:
            vector = self._buffers[name]
            if vector is not None and vector.dtype != dtype:
                self._buffers[name] = vector.to(dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Of a weight that is assigned: it comes with new vectors, but for torch's behaviour."""
        weight = self.original()
        if weight is not None and not self.at_reads and value.shape == weight.shape and not value.is_meta:
            self.restart(value.detach().to(weight))
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> Owned:
        kept = {name: self._buffers[name] for name in self.vectors}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and accumulation_dtype(after.dtype) != after.dtype:
                self._buffers[name] = before.to(after.device)
        self.known.forget()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        weight = self.original()
        if weight is None:
            return
        self.fit(weight)
        if all(prefix + name in state_dict for name in self.vectors):
            self.known.fresh = False
        elif self.known.mark not in (None, steps.mark(weight)) and not weight.is_meta:
            self.restart(weight.detach())

    def __getstate__(self) -> dict[str, Any]:
        owner = self.known.owner
        return {**self.__dict__, "known": (None if owner is None else owner(), self.known.fresh)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        owner, fresh = state["known"]
        super().__setstate__({**state, "known": Known(owner, fresh, copied=True)})


def shorten_reads(module: nn.Module, name: str) -> None:
    """Lets reads of a weight that torch has just parametrized go straight to its parametrization, if that is the only
    one, and ours, and nothing is hooked to the calls of modules by which torch gets there."""
    cls: Any = type(module)
    by_torch = cls.__dict__[name]
    read_by_torch = by_torch.fget

    def read(self: nn.Module) -> Tensor:
        if torch.compiler.is_compiling() or parametrize._cache_enabled or modules._has_any_global_hook():
            return read_by_torch(self)
        owner: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        inside = owner._modules
        norm = inside["0"]
        if len(inside) > 1 or not isinstance(norm, Owned):
            return read_by_torch(self)
        known = norm.known
        if known.unhooked != RemovableHandle.next_id:  # no hook has been registered anywhere since it was looked for
            if _is_hooked(owner) or _is_hooked(norm):
                return read_by_torch(self)
            known.unhooked = RemovableHandle.next_id
        weight = owner._parameters.get("original")
        return norm.read(owner._buffers["original"] if weight is None else weight)

    setattr(cls, name, property(read, by_torch.fset))


def _is_hooked(module: Any) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def make_portable(module: nn.Module) -> None:
    """Lets a module that torch has just parametrized be pickled, and copied to a class of its own: torch's refuses the
    first, and shares the class with copies, which removing a parametrization then breaks."""
    cls: Any = type(module)
    cls.__reduce_ex__ = _reduce
    if not hasattr(cls.__bases__[0], "__deepcopy__"):
        cls.__deepcopy__ = _deepcopy


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    return _rebuilt, (type(self).__bases__[0], tuple(self.parametrizations)), _state(self)


def _deepcopy(self: Any, memo: dict[int, Any]) -> nn.Module:
    replica = _rebuilt(type(self).__bases__[0], tuple(self.parametrizations))
    memo[id(self)] = replica
    replica.__setstate__(copy.deepcopy(_state(self), memo))
    return replica


def _state(module: nn.Module) -> Any:
    own = getattr(type(module).__bases__[0], "__getstate__", None)
    return module.__dict__ if own is getattr(object, "__getstate__", None) else own(module)  # type: ignore[misc]


def _rebuilt(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
        shorten_reads(module, name)
    make_portable(module)
    return module
