"""The functions: spectral_norm, spectral_norm_all, spectral_norm_handle, spectral_normalize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gpkernels._checks import check_count, check_floating, check_number, fail
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.spectral_norm.autograd import spectral_iterate, spectral_scale, without_autocast
from gpkernels.spectral import register
from gpkernels.spectral.convolution import Convolution, ConvolutionNorm
from gpkernels.spectral.group import Group
from gpkernels.spectral.parametrization import SpectralNorm

NORMALISED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
"""The modules whose weights spectral_norm_all takes."""


class Handle:
    """The normalised weights of a model, by name: `layers` maps "path.weight" to (module, "weight", dim). Weights whose
    parametrizations have been removed are passed over."""

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

        For weights changed by anything but a `torch.optim.Optimizer`, and for averages that are to be saved; 15 do for
        weights that have nothing to do with the old ones."""
        if n_power_iterations is not None:
            check_count("n_power_iterations", n_power_iterations)
        groups: dict[Group, list[SpectralNorm]] = {}
        for module, name, _ in self.layers.values():
            norm = register.norm_of(module, name)
            if isinstance(norm, SpectralNorm) and norm.group is not None:
                groups.setdefault(norm.group, []).append(norm)
            elif isinstance(norm, SpectralNorm | ConvolutionNorm):
                norm.update(register.weight_before(module, name), n_power_iterations)
        for group, members in groups.items():
            group.update(members, n_power_iterations)

    def sigmas(self) -> dict[str, Tensor]:
        """The norm of every weight before normalisation, as the layers use it: scalars of the accumulation dtype."""
        found = {}
        for key, (module, name, _) in self.layers.items():
            norm = register.norm_of(module, name)
            if norm is not None:
                found[key] = norm.measure(register.weight_before(module, name))
        return found

    def remove(self, *, leave_parametrized: bool = True) -> None:
        """Removes the parametrizations; the weights stay normalised, or with leave_parametrized=False become what they
        were trained as. The Parameters remain those that the optimizer has."""
        for module, name, _ in self.layers.values():
            if register.norm_of(module, name) is not None:
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
    options = register.check_options(n_power_iterations, eps, target, update, init, norm)
    register.check_module("module", module)
    if norm == "convolution":
        if input_shape is None:
            raise fail("input_shape", "(channels, *spatial) for norm='convolution'", None)
        register.register(module, name, dim, options, None, Convolution.of(module, input_shape))
        return module
    if input_shape is not None:
        raise fail("input_shape", "None for norm='matrix'", tuple(input_shape))
    register.register(module, name, dim, options, register.new_group(options), None)
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
        sample: an input of the model, for norm="convolution": it must reach every convolution, each at one size.
        select: takes the name and the module, and says whether to normalise it.

    Returns:
        A handle with `update()`, `sigmas()`, `remove()` and a length.
    Raises:
        TypeError, ValueError: as `spectral_norm`; no layer to normalise.
    """
    options = register.check_options(n_power_iterations, eps, target, update, init, norm)
    register.check_module("model", model)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NORMALISED) and not register.is_normalised(module, "weight")
        if select is None or select(name, module)
    }
    if not chosen:
        raise fail("model", "a model with a layer to normalise", f"{type(model).__name__} without one")
    for name, module in chosen.items():
        register.check_weight(f"model.{name}" if name else "model", module, "weight")
    convolutions: dict[nn.Module, Convolution] = {}
    if norm == "convolution":
        if not isinstance(sample, Tensor):
            raise TypeError(f"sample: wanted an input of the model for norm='convolution', got {type(sample).__name__}")
        convolutions = register.seen_convolutions(model, chosen, sample)
    group = register.new_group(options)
    layers = {}
    for name, module in chosen.items():
        dim = register.register(module, "weight", None, options, group, convolutions.get(module))
        layers[f"{name}.weight" if name else "weight"] = module, "weight", dim
    return Handle(layers)


def spectral_norm_handle(model: nn.Module) -> Handle:
    """The handle of all weights that this package normalises in a model: of a copy, or an unpickled one."""
    register.check_module("model", model)
    layers = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                norm = register.norm_of(module, name)
                if norm is not None:
                    key = f"{path}.{name}" if path else name
                    layers[key] = module, name, getattr(norm, "dim", register.default_dim(module))
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
        n_power_iterations: a whole number >= 0; 0 takes sigma = u . (W v) as it is.
        target: > 0.

    Returns:
        Tensor like weight; target weight itself where sigma is at most eps.
    Highest gradient order: any, in weight, with u and v as constants.
    Raises:
        TypeError, ValueError: arguments of another kind, shape, dtype or device than stated.
    """
    register.check_matrix("weight", weight)
    check_count("n_power_iterations", n_power_iterations, minimum=0)
    eps, target = check_number("eps", eps, minimum=0), register.check_target(target)
    dim = register.check_dim(dim, weight)
    rows = weight.shape[dim]
    for name, x, size in (("u", u, rows), ("v", v, weight.numel() // rows)):
        check_floating(name, x)
        wanted = (size,), accumulation_dtype(weight.dtype), weight.device
        if (tuple(x.shape), x.dtype, x.device) != wanted or not x.is_contiguous() or x.requires_grad:
            got = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"
            raise fail(name, f"a contiguous constant {wanted[1]} of shape ({size},) on {weight.device}", got)
    with without_autocast(weight):
        sigma = spectral_iterate([weight.detach()], [u], [v], [dim], n_power_iterations, eps)
        return spectral_scale([weight], [u], [v], sigma, [dim], [target], eps)[0]
