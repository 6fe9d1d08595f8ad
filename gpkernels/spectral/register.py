"""What the functions of `api` and `measure` share: arguments, and how a weight is normalised, found and measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm as LegacySpectralNorm

from gpkernels._checks import check_choice, check_count, check_floating, check_number, fail
from gpkernels.spectral.convolution import Convolution, ConvolutionNorm
from gpkernels.spectral.group import Group
from gpkernels.spectral.parametrization import SpectralNorm, SpectralNormOfVector
from gpkernels.spectral.portable import make_portable, shorten_reads

UPDATES, INITS, NORMS = ("step", "read"), ("power", "svd"), ("matrix", "convolution")
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OURS = (SpectralNorm, SpectralNormOfVector, ConvolutionNorm)


def default_dim(module: nn.Module) -> int:
    """Which dimension of a weight counts its outputs: 1 in transposed convolutions, else 0."""
    return 1 if isinstance(module, TRANSPOSED) else 0


def check_options(iterations: int, eps: float, target: float, update: str, init: str, norm: str) -> dict[str, Any]:
    check_choice("update", update, UPDATES)
    check_choice("init", init, INITS)
    check_choice("norm", norm, NORMS)
    return {
        "iterations": check_count("n_power_iterations", iterations),
        "eps": check_number("eps", eps, minimum=0),
        "target": check_target(target),
        "update": update,
        "init": init,
    }


def check_target(target: float) -> float:
    target = check_number("target", target, minimum=0)
    if target == 0:
        raise fail("target", "a number > 0", target)
    return target


def check_module(name: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: wanted a torch.nn.Module, got {type(module).__name__}")


def check_dim(dim: int, weight: Tensor) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim: wanted a whole number, got {type(dim).__name__}")
    if not -weight.dim() <= dim < weight.dim():
        raise fail("dim", f"a dimension of the weight, -{weight.dim()} to {weight.dim() - 1}", dim)
    return dim % weight.dim()


def check_matrix(name: str, weight: Tensor) -> None:
    """`weight` is a dense floating-point tensor with at least one dimension and one element."""
    if isinstance(weight, Tensor) and (weight.dim() == 0 or weight.numel() == 0):
        raise fail(name, "at least one dimension and one element", f"shape {tuple(weight.shape)}")
    check_floating(name, weight)


def check_weight(owner: str, module: nn.Module, name: str) -> Tensor:
    if is_normalised(module, name):
        raise fail(owner, f"a {name} that is not spectrally normalised yet", "one that is")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise fail("name", f"a parameter or buffer of {type(module).__name__}", repr(name))
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise fail(owner, "an initialised weight", "a lazy one: run the model once before")
    check_matrix(f"{owner}.{name}", weight)
    return weight


def new_group(options: Mapping[str, Any]) -> Group | None:
    return Group(options["iterations"], options["eps"]) if options["update"] == "step" else None


def register(
    module: nn.Module,
    name: str,
    dim: int | None,
    options: Mapping[str, Any],
    group: Group | None,
    convolution: Convolution | None,
) -> int:
    """Normalises a weight, and returns its dim."""
    weight = check_weight("module", module, name)
    if options["update"] == "step" and parametrize.is_parametrized(module, name):
        raise fail("update", f"'read' for a {name} with other parametrizations", "'step'")
    dim = check_dim(default_dim(module) if dim is None else dim, weight)
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
    first = not parametrize.is_parametrized(module, name)
    parametrize.register_parametrization(module, name, made)
    make_portable(module)
    if first:
        shorten_reads(module, name)
    if isinstance(made, SpectralNorm | ConvolutionNorm):
        made.attach(_list_of(module, name))
    return dim


def _list_of(module: Any, name: str) -> ParametrizationList:
    return module.parametrizations[name]


def norm_of(module: nn.Module, name: str) -> Any:
    """Our normalisation of a weight; None if it has none, or no longer."""
    lists: Any = module._modules.get("parametrizations")  # as an attribute it takes three times as long
    found = None if lists is None else lists._modules.get(name)
    if found is not None:
        for parametrization in found._modules.values():
            if isinstance(parametrization, _OURS):
                return parametrization
    return None


@torch.no_grad()
def weight_before(module: nn.Module, name: str) -> Tensor:
    """What a spectral normalisation of the weight is given: the weight after any parametrizations before it."""
    if not parametrize.is_parametrized(module, name):
        legacy = any(hook.name == name for hook in _legacy_hooks(module))
        weight = getattr(module, f"{name}_orig" if legacy else name, None)
        if not isinstance(weight, Tensor):
            raise fail("name", f"a parameter or buffer of {type(module).__name__}", repr(name))
        return weight.detach()
    owner = _list_of(module, name)
    values = [owner.original] if owner.is_tensor else [getattr(owner, f"original{i}") for i in range(owner.ntensors)]
    for parametrization in owner:
        if isinstance(parametrization, (*_OURS, parametrizations._SpectralNorm)):
            break
        values = [parametrization(*values)]
    return values[0].detach()


def is_normalised(module: nn.Module, name: str) -> bool:
    if any(hook.name == name for hook in _legacy_hooks(module)):
        return True
    known = (*_OURS, parametrizations._SpectralNorm)
    return parametrize.is_parametrized(module, name) and any(isinstance(p, known) for p in _list_of(module, name))


def _legacy_hooks(module: nn.Module) -> list[LegacySpectralNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, LegacySpectralNorm)]


@torch.no_grad()
def seen_convolutions(model: nn.Module, modules: Mapping[str, nn.Module], sample: Tensor) -> dict[nn.Module, Any]:
    """The convolutions among the modules, on the inputs that they get when the model runs on the sample."""
    names = {m: name for name, m in modules.items() if isinstance(m, nn.modules.conv._ConvNd)}
    found: dict[nn.Module, Convolution] = {}

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        seen = Convolution.of(module, x.shape[-len(module.kernel_size) - 1 :])
        if found.setdefault(module, seen).shape != seen.shape:
            got = f"{found[module].shape} and {seen.shape} for {names[module] or 'it'}"
            raise fail("sample", "one input shape for every convolution (leave others out with select)", got)

    hooks = [m.register_forward_pre_hook(see, with_kwargs=True) for m in names]
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()(sample)
    finally:
        for hook in hooks:
            hook.remove()
        for m, mode in modes.items():
            m.training = mode
    missed = [name for m, name in names.items() if m not in found]
    if missed:
        wanted = "one that reaches every convolution (leave others out with select)"
        raise fail("sample", wanted, f"none in {', '.join(missed)}")
    return found
