"""Modes that repeat published code to the number: against the formulas in plain torch."""

import critics
import oracles
import pytest
import torch

import gpkernels as gp
from gpkernels.functional import grad_norm, grad_norm_penalty
from gpkernels.ops.grad_penalty.penalties import PENALTIES

AXES = ("sample", "pixel", "batch")


def rooted(grad, axes, norm_eps):
    """sqrt(norm_eps + sum g^2) over the group."""
    if axes == "pixel":
        squares = grad.square().sum(1)
    else:
        squares = grad.square().reshape(1 if axes == "batch" else len(grad), -1).sum(1)
    return (norm_eps + squares).sqrt()


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("norm_eps", [1e-8, 0.3])
def test_norm_with_a_constant_under_the_root(backend, device, axes, norm_eps):
    grad = torch.randn(3, 2, 4, 5, dtype=torch.float64, device=device)
    grad[0] = 0
    for x in (grad, grad.contiguous(memory_format=torch.channels_last)):
        got = grad_norm(x, axes=axes, norm_eps=norm_eps)
        torch.testing.assert_close(got, rooted(grad, axes, norm_eps), rtol=1e-12, atol=0)
        assert got.shape == grad_norm(x, axes=axes).shape
    half = grad.to(torch.bfloat16)
    got = grad_norm(half, axes=axes, norm_eps=norm_eps)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, rooted(half.float(), axes, norm_eps), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", PENALTIES)
@pytest.mark.parametrize("axes", AXES)
def test_penalties_of_such_norms_to_the_third_derivative(backend, device, form, axes):
    grad = torch.randn(3, 2, 4, dtype=torch.float64, device=device)
    grad[0] = 0  # where the norm is smooth now, and its gradient 0
    directions = torch.randn(2, *grad.shape, dtype=torch.float64, device=device)
    found = []
    for call in (
        lambda x, reduction: grad_norm_penalty(x, form=form, target=0.7, axes=axes, reduction=reduction, norm_eps=0.01),
        lambda x, reduction: {"mean": torch.mean, "sum": torch.sum, "none": lambda v: v}[reduction](
            oracles.of_form(rooted(x, axes, 0.01), form, 0.7)
        ),
    ):
        x = grad.clone().requires_grad_()
        values = [call(x, reduction) for reduction in ("mean", "sum", "none")]
        total = values[0] + values[1].sin() + values[2].square().sum()
        (first,) = torch.autograd.grad(total, x, create_graph=True)
        (second,) = torch.autograd.grad((first * directions[0]).sum(), x, create_graph=True)
        (third,) = torch.autograd.grad((second * directions[1]).sum(), x)
        found.append([*values, first, second, third])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def test_a_constant_critic_has_a_gradient_of_zero():
    critic = critics.conv()
    torch.nn.init.zeros_(critic[4].weight)
    gp.gradient_penalty(critic, critics.images(), kind="r1", form="linear", norm_eps=1e-8).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())


def by_hand(critic, x, form, k, norm_eps=1e-8):
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return oracles.of_form(rooted(grad, "sample", norm_eps), form, k).mean()


def drawn(per_element, seed=5):
    """The weights that kind "coupled" draws: between ones and zeros they are the points themselves."""
    ones = torch.ones(5, 2, 6, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return gp.interpolate(ones, torch.zeros_like(ones), per_element=per_element, generator=generator)


PRESETS = {
    "dong-yang-coupled": ("coupled", "two_sided"),
    "dong-yang-coupled-one-sided": ("coupled", "maximum"),
    "dong-yang-local": ("local", "two_sided"),
    "dong-yang-r1": ("real", "linear"),
    "dong-yang-r2": ("fake", "linear"),
}


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_dong_and_yang(name, microbatch):
    """Weights between pairs drawn for each element, or N(0, 1) around real ones, sqrt(1e-8 + sum g^2), R1 and R2 not
    squared and not halved."""
    critic, real, fake = critics.conv(), critics.images(), critics.images()
    where, form = PRESETS[name]
    weights = drawn(per_element=True)
    noise = gp.perturb(torch.zeros_like(real), scale=1.0, generator=torch.Generator().manual_seed(5))
    x = {"coupled": weights * real + (1 - weights) * fake, "local": real + 0.01 * noise, "real": real, "fake": fake}[
        where
    ]
    penalty = gp.GradientPenalty.from_preset(name, target=0.4, microbatch=microbatch)
    got = penalty(critic, real, fake, generator=torch.Generator().manual_seed(5))
    critics.assert_same_gradients(got, 10 * by_hand(critic, x, form, 0.4), critic)
    if where in ("real", "fake"):
        scores, shared = penalty.score_and_penalty(critic, x)
        critics.assert_same_gradients(scores.sum() + shared, critic(x).sum() + got, critic)


def test_the_weights_of_pairs_are_one_an_element_only_where_asked():
    assert len(drawn(True).unique()) == 5 * 72
    assert all(len(sample.unique()) == 1 for sample in drawn(False))
    real, fake, seen = critics.images(), critics.images(), []
    critic = lambda x: seen.append(x.detach()) or x.flatten(1).sum(1)  # noqa: E731
    for per_element in (False, True):
        generator = torch.Generator().manual_seed(5)
        gp.gradient_penalty(critic, real, fake, per_element=per_element, generator=generator)
        weights = drawn(per_element)
        torch.testing.assert_close(seen.pop(), weights * real + (1 - weights) * fake)


def test_the_norm_by_pixel_of_copies_of_wgan_gp():
    critic, real, fake = critics.conv(), critics.images(), critics.images()
    weights = drawn(False)
    x = weights * real + (1 - weights) * fake
    got = gp.GradientPenalty.from_preset("wgan-gp-pixel")(
        critic, real, fake, generator=torch.Generator().manual_seed(5)
    )
    critics.assert_same_gradients(got, 10 * oracles.gradient_penalty(critic, x, "two_sided", axes="pixel"), critic)


def test_normal_noise_has_a_size_of_its_own():
    """Uniform noise grows with the images, normal noise does not."""
    seen = []
    critic = lambda x: seen.append(x.detach()) or x.flatten(1).sum(1)  # noqa: E731
    for scale in (1.0, 100.0):
        real = scale * torch.randn(2000, 3)
        gp.gradient_penalty(critic, real, kind="local", noise="normal", scale=0.2)
        noise = seen.pop() - real
        assert noise.std().item() == pytest.approx(0.2, rel=0.05)
        assert noise.abs().max() > 0.6


X = torch.randn(3, 2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grad_norm(X, norm="l1", norm_eps=1e-8), ValueError, r"norm_eps: wanted 0 for norm 'l1' \(only 'l2'"),
        (lambda: grad_norm(X, norm_eps=-1.0), ValueError, "norm_eps: wanted a finite number >= 0, got -1"),
        (lambda: grad_norm(X, norm_eps="1"), TypeError, "norm_eps: wanted a number, got str"),
        (lambda: grad_norm_penalty(X, form="cubic", norm_eps=1e-8), ValueError, "form: wanted one of"),
        (
            lambda: gp.GradientPenalty("r1", norm="linf", norm_eps=1e-8),
            ValueError,
            "norm_eps: wanted 0 for norm 'linf'",
        ),
        (lambda: gp.GradientPenalty("r1", per_element=True), ValueError, "per_element: wanted False for kind 'r1'"),
        (lambda: gp.GradientPenalty("r1", noise="normal"), ValueError, "noise: wanted None for kind 'r1'"),
        (lambda: gp.GradientPenalty("local", noise="normal"), ValueError, "scale: wanted a number for noise 'normal'"),
        (lambda: gp.GradientPenalty("local", noise="cauchy"), ValueError, "noise: wanted one of 'normal', 'uniform'"),
        (
            lambda: gp.gradient_penalty(lambda x: x.sum((1, 2)), X, kind="local", per_element=True),
            ValueError,
            "per_element: wanted False for kind 'local'",
        ),
        (
            lambda: gp.GradientPenalty(per_element=True)(lambda x: x.sum((1, 2)), X, X, eps=torch.rand(3)),
            ValueError,
            "per_element: wanted False when eps is given",
        ),
    ],
)
def test_bad_options(call, error, message):
    with pytest.raises(error, match=message):
        call()
