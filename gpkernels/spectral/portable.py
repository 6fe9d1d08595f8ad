"""What the parametrizations share: they find their weight, keep float32 buffers, copy and pickle with their module."""

from __future__ import annotations

import copy
import weakref
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.spectral import steps


class Known:
    """What is known beside the buffers: a plain object, whose attributes cost a tenth of a module's."""

    __slots__ = ("at", "mark", "owner", "results", "sigma", "state")

    def __init__(self, owner: ParametrizationList | None = None) -> None:
        self.owner = None if owner is None else weakref.ref(owner)
        self.at = 0
        """The time of the last update, its sigma, and the state and the weight's mark that it left."""
        self.sigma: Tensor | None = None
        self.state: State | None = None
        self.mark: steps.Mark | None = None
        self.results: dict[bool, Any] = {}

    def forget(self) -> None:
        """The weight has changed, perhaps with its version unmoved, and u and v have not."""
        self.state = None
        self.results.clear()


State = tuple[steps.Mark | None, ...]
"""What a normalised weight is a function of: the marks of the weight and the vectors."""


class Owned(nn.Module):
    """A parametrization that knows the list it is in, without keeping it alive, and so the weight."""

    vectors: ClassVar[tuple[str, ...]] = ()
    """The buffers of a normalisation, kept in the accumulation dtype of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.known = Known()

    def attach(self, owner: ParametrizationList) -> None:
        self.known = Known(owner)

    def original(self) -> Tensor | None:
        """The weight, where this is the first parametrization of it."""
        reference = self.known.owner
        owner = None if reference is None else reference()
        if owner is None or owner._modules.get("0") is not self:
            return None
        weight = owner._parameters.get("original")
        return owner._buffers.get("original") if weight is None else weight

    def fit(self, weight: Tensor) -> None:
        dtype = accumulation_dtype(weight.dtype)
        for name in self.vectors:
            vector = self._buffers[name]
            if vector is not None and vector.dtype != dtype:
                self._buffers[name] = vector.to(dtype)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def _apply(self, fn: Any, recurse: bool = True) -> Owned:
        kept = {name: self._buffers[name] for name in self.vectors}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and accumulation_dtype(after.dtype) != after.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        weight = self.original()
        if weight is not None:
            self.fit(weight)

    def __getstate__(self) -> dict[str, Any]:
        owner = self.known.owner
        return {**self.__dict__, "known": None if owner is None else owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "known": Known(state["known"])})


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
    make_portable(module)
    return module
