"""Defects found in public gradient-penalty code, each kept out by a test. Named after what went wrong there."""

import critics
import pytest
import torch
from torch import nn

import gpkernels as gp


def linear_critic(slope):
    """A critic whose gradient is `slope` (shape of one sample) everywhere."""
    return lambda x: (x * slope).flatten(1).sum(1)


def unit_slope():
    slope = torch.randn(3, 4, 4, dtype=torch.float64)
    return slope / slope.norm()


def test_norm_over_the_whole_batch_instead_of_per_sample():
    """64 unit gradients have penalty 0; one norm over all of them is 8, and (8 - 1)^2 = 49."""
    x = torch.randn(64, 3, 4, 4, dtype=torch.float64)
    assert gp.gradient_penalty(linear_critic(unit_slope()), x, x, weight=1.0).item() == pytest.approx(0, abs=1e-20)
    whole = gp.gradient_penalty(linear_critic(unit_slope()), x, x, weight=1.0, axes="batch")
    assert whole.item() == pytest.approx(49)


def test_norm_over_channels_of_an_unflattened_gradient():
    """norm(2, dim=1) of (B, C, H, W) is a norm per pixel: that is axes="pixel", asked for by name only."""
    x, slope = torch.randn(5, 3, 4, 4, dtype=torch.float64), unit_slope()
    pixel = (slope.norm(2, dim=0) - 1).square().mean()
    got = gp.gradient_penalty(linear_critic(slope), x, x, weight=1.0, axes="pixel")
    torch.testing.assert_close(got, pixel)
    assert gp.gradient_penalty(linear_critic(slope), x, x, weight=1.0) < 1e-20


@pytest.mark.parametrize("per_element", [False, True])
def test_one_eps_for_the_batch_or_one_per_pixel_unasked(per_element):
    real = torch.ones(64, 3, 4, 4)
    eps = gp.interpolate(real, torch.zeros_like(real), per_element=per_element)
    assert len(eps.unique()) > 3000 if per_element else len(eps.unique()) == 64  # 24 bits may collide


def test_one_quadrant_dragan_noise():
    """The published code added U[0, 1) noise: every point moved towards brighter. The mean move must be 0."""
    real, seen = torch.randn(2000, 3), []

    def critic(x):
        seen.append((x - real).detach())
        return x.sum(1)

    gp.gradient_penalty(critic, real, kind="local")
    (move,) = seen
    assert abs(move.mean()) < 4 * move.std() / move.numel() ** 0.5
    bound = 0.5 * real.std(correction=0)
    assert move.abs().max() <= bound * 1.0001
    assert move.std() == pytest.approx(bound.item() / 3**0.5, rel=0.05)


@pytest.mark.parametrize("form", ["two_sided", "one_sided", "linear", "squared", "maximum"])
def test_square_root_at_zero_gradient_is_nan(form):
    """A critic that starts constant: the norm's derivative at 0 must not turn every parameter into NaN."""
    critic = critics.conv()
    nn.init.zeros_(critic[4].weight)
    gp.gradient_penalty(critic, critics.images(), kind="r1", form=form).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in critic.parameters())


def test_penalty_with_its_own_optimizer_step():
    """The penalty is one term of one loss: one backward gives the sum of the gradients."""
    critic, real, fake = critics.conv(), critics.images(), critics.images()
    adversarial = critic(fake).mean() - critic(real).mean()
    penalty = gp.gradient_penalty(critic, real, fake)
    separate = [
        a + b
        for a, b in zip(
            critics.parameter_gradients(adversarial, critic), critics.parameter_gradients(penalty, critic), strict=True
        )
    ]
    (adversarial + penalty).backward()
    for parameter, wanted in zip(critic.parameters(), separate, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


@pytest.mark.parametrize("kind", ["coupled", "r2"])
def test_fake_not_detached_wastes_a_generator_backward(kind):
    generator, critic = nn.Linear(3, 72).double(), critics.conv()
    fake = generator(torch.randn(5, 3, dtype=torch.float64)).reshape(5, 2, 6, 6)
    gp.gradient_penalty(critic, critics.images(), fake, kind=kind).backward()
    assert generator.weight.grad is None
    assert critic[0].weight.grad is not None


def test_custom_op_without_a_second_derivative_gives_a_silent_none():
    """Every parameter that the penalty depends on gets a gradient, through every op on the way, on every backend."""
    for name in ("reference", "cpu"):
        with gp.backend(name):
            critic = critics.conv()
            gp.gradient_penalty(critic, critics.images(), critics.images()).backward()
            assert critic[0].weight.grad.abs().sum() > 0
            assert critic[4].weight.grad.abs().sum() > 0
