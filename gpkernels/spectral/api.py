"""The functions: spectral_norm, spectral_norm_all, spectral_norm_handle, spectral_normalize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as LegacySpectralNorm

from gpkernels._checks import check_choice, check_count, check_floating, check_number, fail
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.spectral_norm.autograd import spectral_iterate, spectral_scale
from gpkernels.spectral.convolution import Convolution, ConvolutionNorm
from gpkernels.spectral.group import Group, copies
from gpkernels.spectral.measure import default_dim
from gpkernels.spectral.parametrization import SpectralNorm, SpectralNormOfVector
from gpkernels.spectral.portable import make_portable

UPDATES, INITS, NORMS = ("step", "read"), ("power", "svd"), ("matrix", "convolution")
NORMALISED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
"""The modules whose weights spectral_norm_all takes."""
_OURS = (SpectralNorm, SpectralNormOfVector, ConvolutionNorm)


class Handle:
    """The normalised weights of a model, by name: `layers` maps "path.weight" to (module, "weight", dim)."""

    def __init__(self, layers: Mapping[str, tuple[nn.Module, str, int]]) -> None:
        self.layers = dict(layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __repr__(self) -> str:
        return f"Handle({', '.join(self.layers)})"

    def update(self, n_power_iterations: int | None = None) -> None:
        """Moves u and v of every layer, in eval mode too, by so many iterations (default: the layers' own).

        For weights changed by anything but a `torch.optim.Optimizer`, and for averages that are to be saved."""
        if n_power_iterations is not None:
            check_count("n_power_iterations", n_power_iterations)
        groups: dict[Group, list[SpectralNorm]] = {}
        for module, name, _ in self.layers.values():
            norm = _norm_of(module, name)
            if isinstance(norm, SpectralNorm) and norm.group is not None:
                groups.setdefault(norm.group, []).append(norm)
            elif isinstance(norm, SpectralNorm | ConvolutionNorm):
                norm.update(_input_of(module, name, norm), n_power_iterations)
        for group, members in groups.items():
            group.update(members, n_power_iterations)

    def sigmas(self) -> dict[str, Tensor]:
        """The norm of every weight before normalisation, as the layers use it: scalars of the accumulation dtype."""
        found = {}
        for key, (module, name, _) in self.layers.items():
            norm = _norm_of(module, name)
            found[key] = norm.measure(_input_of(module, name, norm))
        return found

    def remove(self, *, leave_parametrized: bool = True) -> None:
        """Removes the parametrizations; the weights stay normalised, or with leave_parametrized=False become what they
        were trained as. The Parameters remain those that the optimizer has."""
        for module, name, _ in self.layers.values():
            parametrize.remove_parametrizations(module, name, leave_parametrized)
        self.layers.clear()


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    target: float = 1.0,
    update: str = "step",
    init: str = "power",
    norm: str = "matrix",
    input_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Normalises a weight of a module by its spectral norm (Miyato et al. 2018, algorithm 1).

    The weight is seen as the matrix (shape[dim], the other dimensions). Its u and v move once per optimizer step; a
    read changes nothing. `spectral_norm_all` does it for a model with far fewer launches.

    Args:
        module, name: the parameter or buffer, of any floating dtype; a vector is divided by its length.
        n_power_iterations: a whole number >= 1, per update.
        eps: a weight whose norm is at most eps is left as it is, and so are its u and v.
        dim: the dimension of the outputs; None is 1 for transposed convolutions, else 0.
        target: the norm that the weight is given.
        update: "step", after every optimizer step that changes the weight while the module is in training mode; or
            "read", torch's behaviour: at every read in training mode.
        init: u and v at first: "power", 15 iterations from random vectors, as torch; or "svd", exact.
        norm: "matrix"; or "convolution", the operator norm on inputs of shape `input_shape`: see `ConvolutionNorm`
            for what it costs.
        input_shape: (channels, *spatial) or its spatial part, for norm="convolution".

    Returns:
        The module, parametrized by `torch.nn.utils.parametrize`. The tensor that a read returns is shared with other
        reads: do not write to it.
    Highest gradient order: any.
    Raises:
        TypeError, ValueError: arguments of another kind than stated, a weight that is already normalised, empty,
            not floating-point or not initialised.
    """
    options = _options(n_power_iterations, eps, target, update, init, norm)
    _check_module("module", module)
    if norm == "convolution":
        if input_shape is None:
            raise fail("input_shape", "(channels, *spatial) for norm='convolution'", None)
        _register(module, name, dim, options, None, Convolution.of(module, input_shape))
        return module
    if input_shape is not None:
        raise fail("input_shape", "None for norm='matrix'", tuple(input_shape))
    _register(module, name, dim, options, _new_group(options), None)
    return module


def spectral_norm_all(
    model: nn.Module,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    target: float = 1.0,
    update: str = "step",
    init: str = "power",
    norm: str = "matrix",
    sample: Tensor | None = None,
    select: Callable[[str, nn.Module], bool] | None = None,
) -> Handle:
    """Normalises the weight of every convolution, transposed convolution, linear, bilinear and embedding layer.

    Layers that are already normalised are left alone. All layers form a group: whatever their number, one call moves
    all u and v, one makes all normalised weights, one their gradients.

    Args:
        n_power_iterations, eps, target, update, init: as in `spectral_norm`.
        norm: "matrix"; or "convolution", for convolutions their operator norm, at the input shapes that a run of the
            model on `sample` shows.
        sample: an input of the model, for norm="convolution".
        select: takes the name and the module, and says whether to normalise it.

    Returns:
        A handle with `update()`, `sigmas()`, `remove()` and a length.
    Raises:
        TypeError, ValueError: as `spectral_norm`; no layer to normalise.
    """
    options = _options(n_power_iterations, eps, target, update, init, norm)
    _check_module("model", model)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NORMALISED) and not _is_normalised(module, "weight")
        if select is None or select(name, module)
    }
    if not chosen:
        raise fail("model", "a model with a layer to normalise", f"{type(model).__name__} without one")
    for name, module in chosen.items():
        _check_weight(f"model.{name}" if name else "model", module, "weight")
    convolutions: dict[nn.Module, Convolution] = {}
    if norm == "convolution":
        if not isinstance(sample, Tensor):
            raise TypeError(f"sample: wanted an input of the model for norm='convolution', got {type(sample).__name__}")
        convolutions = _seen_convolutions(model, chosen.values(), sample)
    group = _new_group(options)
    layers = {}
    for name, module in chosen.items():
        dim = _register(module, "weight", None, options, group, convolutions.get(module))
        layers[f"{name}.weight" if name else "weight"] = module, "weight", dim
    return Handle(layers)


def spectral_norm_handle(model: nn.Module) -> Handle:
    """The handle of all weights that this package normalises in a model: of a copy, or an unpickled one."""
    _check_module("model", model)
    layers = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                norm = _norm_of(module, name)
                if norm is not None:
                    key = f"{path}.{name}" if path else name
                    layers[key] = module, name, getattr(norm, "dim", default_dim(module))
    return Handle(layers)


def spectral_normalize(
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int = 0,
    target: float = 1.0,
) -> Tensor:
    """target weight / sigma, after so many power iterations of u and v in place.

    Args:
        weight: any shape with at least one dimension, any floating dtype; the matrix (shape[dim], the others).
        u, v: unit vectors of shape (rows,) and (cols,), contiguous, float32 (float64 for a float64 weight), on the
            weight's device. A zero weight leaves them as they are.
        n_power_iterations: a whole number >= 0.

    Returns:
        Tensor like weight; target weight itself where sigma is at most eps.
    Highest gradient order: any, in weight, with u and v as constants.
    Raises:
        TypeError, ValueError: arguments of another kind, shape, dtype or device than stated.
    """
    check_floating("weight", weight)
    if isinstance(n_power_iterations, bool) or not isinstance(n_power_iterations, int):
        raise TypeError(f"n_power_iterations: wanted a whole number, got {type(n_power_iterations).__name__}")
    if n_power_iterations < 0:
        raise fail("n_power_iterations", "a whole number >= 0", n_power_iterations)
    eps, target = check_number("eps", eps, minimum=0), check_number("target", target, minimum=0)
    dim = _check_dim(dim, weight)
    rows = weight.shape[dim]
    for name, x, size in (("u", u, rows), ("v", v, weight.numel() // rows)):
        check_floating(name, x)
        wanted = (size,), accumulation_dtype(weight.dtype), weight.device
        if (tuple(x.shape), x.dtype, x.device) != wanted or not x.is_contiguous() or x.requires_grad:
            got = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            raise fail(name, f"a contiguous constant {wanted[1]} of shape ({size},) on {weight.device}", got)
    with torch.autocast(weight.device.type, enabled=False):
        sigma = spectral_iterate([weight.detach()], [u], [v], [dim], n_power_iterations, eps)
        u, v = copies([u, v])
        return spectral_scale([weight], [u], [v], sigma, [dim], [target], eps)[0]


def _options(iterations: int, eps: float, target: float, update: str, init: str, norm: str) -> dict[str, Any]:
    check_choice("update", update, UPDATES)
    check_choice("init", init, INITS)
    check_choice("norm", norm, NORMS)
    target = check_number("target", target, minimum=0)
    if target == 0:
        raise fail("target", "a number > 0", target)
    return {
        "iterations": check_count("n_power_iterations", iterations),
        "eps": check_number("eps", eps, minimum=0),
        "target": target,
        "update": update,
        "init": init,
    }


def _new_group(options: Mapping[str, Any]) -> Group | None:
    return Group(options["iterations"], options["eps"]) if options["update"] == "step" else None


def _check_module(name: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: wanted a torch.nn.Module, got {type(module).__name__}")


def _check_dim(dim: int, weight: Tensor) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: wanted a whole number, got {type(dim).__name__}")
    if not -weight.dim() <= dim < weight.dim():
        raise fail("dim", f"a dimension of the weight, -{weight.dim()} to {weight.dim() - 1}", dim)
    return dim % weight.dim()


def _check_weight(owner: str, module: nn.Module, name: str) -> Tensor:
    if _is_normalised(module, name):
        raise fail(owner, f"a {name} that is not spectrally normalised yet", "one that is")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise fail("name", f"a parameter or buffer of {type(module).__name__}", repr(name))
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise fail(owner, "an initialised weight", "a lazy one: run the model once before")
    check_floating(f"{owner}.{name}", weight)
    return weight


def _register(
    module: nn.Module,
    name: str,
    dim: int | None,
    options: Mapping[str, Any],
    group: Group | None,
    convolution: Convolution | None,
) -> int:
    weight = _check_weight("module", module, name)
    if options["update"] == "step" and parametrize.is_parametrized(module, name):
        raise fail("update", f"'read' for a {name} with other parametrizations", "'step'")
    dim = _check_dim(default_dim(module) if dim is None else dim, weight)
    common = {"eps": options["eps"], "target": options["target"]}
    made: nn.Module
    if convolution is not None:
        made = ConvolutionNorm(
            weight, convolution, iterations=options["iterations"], at_reads=options["update"] == "read", **common
        )
    elif weight.dim() == 1:
        made = SpectralNormOfVector(**common)
    else:
        made = SpectralNorm(weight, dim, iterations=options["iterations"], init=options["init"], group=group, **common)
    made.train(module.training)
    parametrize.register_parametrization(module, name, made)
    make_portable(module)
    if isinstance(made, SpectralNorm | ConvolutionNorm):
        made.attach(_list_of(module, name))
    return dim


def _list_of(module: Any, name: str) -> ParametrizationList:
    return module.parametrizations[name]


def _norm_of(module: nn.Module, name: str) -> Any:
    return next((p for p in _list_of(module, name) if isinstance(p, _OURS)), None)


@torch.no_grad()
def _input_of(module: nn.Module, name: str, norm: nn.Module) -> Tensor:
    """What a normalisation is given: the weight after the parametrizations before it."""
    owner = _list_of(module, name)
    values = [owner.original] if owner.is_tensor else [getattr(owner, f"original{i}") for i in range(owner.ntensors)]
    for parametrization in owner:
        if parametrization is norm:
            break
        values = [parametrization(*values)]
    return values[0].detach()


def _is_normalised(module: nn.Module, name: str) -> bool:
    if any(isinstance(hook, LegacySpectralNorm) and hook.name == name for hook in module._forward_pre_hooks.values()):
        return True
    known = (*_OURS, parametrizations._SpectralNorm)
    return parametrize.is_parametrized(module, name) and any(isinstance(p, known) for p in _list_of(module, name))


@torch.no_grad()
def _seen_convolutions(model: nn.Module, modules: Any, sample: Tensor) -> dict[nn.Module, Convolution]:
    found: dict[nn.Module, Convolution] = {}

    def see(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[module] = Convolution.of(module, inputs[0].shape[1:])

    hooks = [m.register_forward_pre_hook(see) for m in modules if isinstance(m, nn.modules.conv._ConvNd)]
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()(sample)
    finally:
        for hook in hooks:
            hook.remove()
        for m, mode in modes.items():
            m.training = mode
    return found
