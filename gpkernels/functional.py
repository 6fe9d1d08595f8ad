"""The op-level functions: argument checks, random seeds, and the way down to the autograd Functions."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gpkernels import registry
from gpkernels._checks import check_choice, check_floating, check_number, check_same, fail
from gpkernels._support import under_transform
from gpkernels.ops._layout import accumulation_dtype, layout_of
from gpkernels.ops.grad_penalty import penalties
from gpkernels.ops.grad_penalty.autograd import GradNormPenalty, Options
from gpkernels.ops.grad_penalty.reference import AXES, NORMS, REDUCTIONS
from gpkernels.ops.interpolate.autograd import Interpolate
from gpkernels.ops.pairwise_cost.autograd import PairwiseCost
from gpkernels.ops.perturb.autograd import Perturb
from gpkernels.ops.perturb.reference import NOISES, std
from gpkernels.ops.random import draw_seed


def interpolate(
    real: Tensor,
    fake: Tensor,
    *,
    eps: Tensor | None = None,
    per_element: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points between pairs of samples, eps * real + (1 - eps) * fake (Gulrajani et al. 2017, Algorithm 1).

    Args:
        real: shape (B, ...), any floating dtype.
        fake: shape, dtype and device of `real`; paired with it by batch index.
        eps: shape (B,) or (B, 1, ..., 1), a constant. None draws U[0, 1) per sample, in float32.
        per_element: draw one eps per element instead of one per sample, as some public code does.
        generator: the torch generator that keys the draw; the device's default if None.

    Returns:
        Tensor like `real` (its dtype and, where it is contiguous or channels_last, its memory layout).
    Highest gradient order: any, in `real` and `fake`.
    Raises:
        TypeError: not a floating-point tensor.
        ValueError: mismatched or empty tensors, an eps of another shape or device or that requires grad, eps
            together with per_element, a generator of another device.
    """
    check_floating("real", real)
    check_floating("fake", fake)
    check_same("fake", fake, "real", real)
    seed = None
    if eps is None:
        seed = draw_seed(real, generator)
    else:
        eps = _checked_eps(eps, real, per_element)
    impl = registry.choose("interpolate", real)
    layout = layout_of(real)
    real, fake = real.contiguous(memory_format=layout), fake.contiguous(memory_format=layout)
    if under_transform():
        return impl.forward(real, fake, eps, seed, per_element)
    return Interpolate.apply(real, fake, eps, seed, (per_element, layout, impl))


def _checked_eps(eps: Tensor, real: Tensor, per_element: bool) -> Tensor:
    if per_element:
        raise fail("per_element", "False when eps is given", "True")
    check_floating("eps", eps)
    batch = real.shape[0]
    if eps.shape[0] != batch or eps.numel() != batch:
        raise fail("eps", f"shape ({batch},) or ({batch}, 1, ..., 1)", f"shape {tuple(eps.shape)}")
    if eps.device != real.device:
        raise fail("eps", f"the device of real, {real.device}", eps.device)
    if eps.requires_grad:
        raise fail("eps", "a constant", "a tensor that requires grad")
    if eps.dim() > 1:
        eps = eps.reshape(-1)
    dtype = accumulation_dtype(real.dtype)
    return (eps if eps.dtype == dtype else eps.to(dtype)).contiguous()


def perturb(
    real: Tensor,
    *,
    scale: float,
    noise: str = "normal",
    relative: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points around samples, real + scale * noise (Kodali et al. 2017, section 2.3).

    Args:
        real: shape (B, ...), any floating dtype.
        scale: the noise's scale, a finite number >= 0.
        noise: "normal", N(0, 1), or "uniform", U[-1, 1): both are symmetric around 0.
        relative: multiply the noise by the standard deviation of all elements of `real` (population, as numpy's).
        generator: the torch generator that keys the draw; the device's default if None.

    Returns:
        Tensor like `real` (its dtype and, where it is contiguous or channels_last, its memory layout). The noise
        is drawn in float32 whatever the dtype.
    Highest gradient order: any, in `real`, through the standard deviation too.
    Raises:
        TypeError: not a floating-point tensor, or scale not a number.
        ValueError: an empty tensor, a negative or non-finite scale, an unknown noise, a generator of another device.
    """
    check_floating("real", real)
    scale = check_number("scale", scale, minimum=0)
    check_choice("noise", noise, NOISES)
    seed = draw_seed(real, generator)
    impl = registry.choose("perturb", real)
    layout = layout_of(real)
    real = real.contiguous(memory_format=layout)
    sigma = std(real) if relative else None
    if under_transform():
        return impl.forward(real, sigma, scale, NOISES.index(noise), seed)
    return Perturb.apply(real, sigma, seed, (scale, NOISES.index(noise), layout, impl))


def grad_norm(grad: Tensor, *, norm: str = "l2", axes: str = "sample", norm_eps: float = 0.0) -> Tensor:
    """Norms of a gradient, with derivative 0 where they are 0.

    Args:
        grad: shape (B, ...), any floating dtype.
        norm: "l2", "l1" or "linf".
        axes: over what the norm runs: "sample", all of a sample; "pixel", the channels (dimension 1) of each
            pixel; "batch", everything.
        norm_eps: "l2" only: the norm is sqrt(norm_eps + sum g^2), as some public code has it; a finite number >= 0.

    Returns:
        Shape (B,) for "sample", (B, *spatial) for "pixel", (1,) for "batch"; float64 for a float64 `grad`, float32
        for every other dtype.
    Highest gradient order: any.
    Raises:
        TypeError: not a floating-point tensor.
        ValueError: an empty tensor, an unknown norm or axes, "pixel" of a one-dimensional tensor, a negative norm_eps
            or one for another norm than "l2".
    """
    return grad_norm_penalty(grad, form="linear", norm=norm, axes=axes, reduction="none", norm_eps=norm_eps)


def grad_norm_penalty(
    grad: Tensor,
    *,
    form: str = "two_sided",
    target: float = 1.0,
    norm: str = "l2",
    axes: str = "sample",
    reduction: str = "mean",
    norm_eps: float = 0.0,
) -> Tensor:
    """A penalty on the norms of a gradient you already have.

    With n the norms that `grad_norm` returns and k the target, the penalty is, by `form`: two_sided (n - k)^2 |
    one_sided max(0, n - k)^2 | one_sided_linear max(0, n - k) | maximum max(n, k) | linear n | squared n^2.
    Sources are in `gpkernels/ops/grad_penalty/penalties.py`, whose rows these are.

    Args:
        grad: shape (B, ...), any floating dtype.
        target: k, a finite number >= 0; linear and squared ignore it.
        norm, axes, norm_eps: as in `grad_norm`. A norm_eps costs a few operations more on the norms, none on `grad`.
        reduction: "mean" or "sum" over all norms, or "none".

    Returns:
        Shape () or, for "none", the shape of the norms; float64 for a float64 `grad`, else float32.
    Highest gradient order: any. Where a norm is 0 its gradient is 0, never NaN.
    Raises:
        TypeError: not a floating-point tensor, or target not a number.
        ValueError: an empty tensor, an unknown option, a negative target, "pixel" of a one-dimensional tensor, a
            negative norm_eps or one for another norm than "l2".
    """
    if check_norm_eps(norm_eps, norm):
        squares = grad_norm_penalty(grad, form="squared", axes=axes, reduction="none")
        n = (squares + norm_eps).sqrt()
        one_each = n.reshape(-1, 1)  # whose norm is n itself
        value = grad_norm_penalty(one_each, form=form, target=target, norm="l1", reduction=reduction)
        return value.reshape(n.shape) if reduction == "none" else value
    check_floating("grad", grad)
    options = _penalty_options(form, target, norm, axes, reduction)
    if axes == "pixel" and grad.dim() < 2:
        raise fail("grad", "at least 2 dimensions for axes='pixel'", f"shape {tuple(grad.shape)}")
    impl = registry.choose("grad_norm_penalty", grad, form=options[0])
    if not grad.is_contiguous():
        grad = grad.contiguous(memory_format=layout_of(grad))
    if under_transform():
        return impl.forward(grad, *options)[0]
    return GradNormPenalty.apply(grad, (options, impl))


def check_norm_eps(norm_eps: float, norm: str) -> float:
    norm_eps = check_number("norm_eps", norm_eps, minimum=0)
    if norm_eps and norm != "l2":
        raise fail("norm_eps", f"0 for norm {norm!r} (only 'l2' has a root)", norm_eps)
    return norm_eps


@functools.lru_cache(maxsize=128)
def _penalty_options(form: str, target: float, norm: str, axes: str, reduction: str) -> Options:
    """The raw ops' codes for these options, checked."""
    check_choice("form", form, penalties.PENALTIES)
    check_choice("norm", norm, NORMS)
    check_choice("axes", axes, AXES)
    check_choice("reduction", reduction, REDUCTIONS)
    target = check_number("target", target, minimum=0)
    return penalties.code_of(form), target, NORMS.index(norm), AXES.index(axes), REDUCTIONS.index(reduction)


def pairwise_cost(
    real: Tensor,
    fake: Tensor,
    loss_real: Tensor,
    loss_fake: Tensor,
    *,
    margin: float = 2e-4,
    slope: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The cost of pairs in the loss-sensitive family: (cost, delta), one each a pair.

    delta = margin * ||real - fake||_1, summed over the sample; with a = delta + loss_real - loss_fake, the cost is
    C(a) = max(a, slope a): LS-GAN's hinge for slope 0, GLS-GAN's for others (Qi 2020, "Loss-sensitive generative
    adversarial networks", equations 4 and 16).

    Args:
        real: shape (B, ...), any floating dtype.
        fake: shape, dtype and device of `real`; paired with it by batch index.
        loss_real, loss_fake: what the critic gives for `real` and for `fake`, shape (B,) or (B, 1, ..., 1), any
            floating dtype; float64 only together with float64 samples.
        margin: a finite number >= 0.
        slope: a finite number <= 1.

    Returns:
        Two tensors of shape (B,); float64 for float64 samples, float32 for every other dtype. NaN and inf reach the
        pair they belong to and no other.
    Highest gradient order: any, of the cost in `loss_real` and `loss_fake`; C'(0) is 1. delta is a constant, as the
    method defines it: `real` and `fake` get no gradient from this function.
    Raises:
        TypeError: not a floating-point tensor, or margin or slope not a number.
        ValueError: mismatched or empty tensors, losses of another shape, device or of a higher precision, a margin
            below 0, a slope above 1, or either not finite.
    """
    check_floating("real", real)
    check_floating("fake", fake)
    check_same("fake", fake, "real", real)
    margin = check_number("margin", margin, minimum=0)
    slope = check_number("slope", slope)
    if slope > 1:
        raise fail("slope", "a finite number <= 1", slope)
    loss_real, loss_fake = _checked_losses("loss_real", loss_real, real), _checked_losses("loss_fake", loss_fake, real)
    impl = registry.choose("pairwise_cost", real)
    layout = layout_of(real)
    real, fake = ((x.detach() if x.requires_grad else x).contiguous(memory_format=layout) for x in (real, fake))
    if under_transform():
        return impl.forward(real, fake, loss_real, loss_fake, margin, slope)[:2]
    return PairwiseCost.apply(real, fake, loss_real, loss_fake, (margin, slope, impl))


def _checked_losses(name: str, losses: Tensor, real: Tensor) -> Tensor:
    """As a contiguous vector in the accumulation dtype of `real`."""
    check_floating(name, losses)
    batch = real.shape[0]
    if losses.shape[0] != batch or losses.numel() != batch:
        raise fail(name, f"shape ({batch},) or ({batch}, 1, ..., 1)", f"shape {tuple(losses.shape)}")
    if losses.device != real.device:
        raise fail(name, f"the device of real, {real.device}", losses.device)
    dtype = accumulation_dtype(real.dtype)
    if losses.dtype == torch.float64 != dtype:
        raise fail(name, f"at most {dtype}, since real is {real.dtype}", losses.dtype)
    if losses.dim() > 1:
        losses = losses.reshape(-1)
    return (losses if losses.dtype == dtype else losses.to(dtype)).contiguous()
