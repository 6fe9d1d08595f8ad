"""Every adversarial loss against its published D loss and G loss, written out in numpy; orders, dtypes, shapes."""

import numpy as np
import pytest
import torch
from threads import one_thread  # noqa: F401
from torch.nn import functional as F

from gpkernels import losses
from gpkernels.losses import COMPONENTS, LOSSES


def sp(y):
    return np.logaddexp(0, y)


def plus(y):
    return np.maximum(0, y)


def mean(*terms):
    return sum(np.mean(term) for term in terms)


PUBLISHED = {  # name: (D loss, G loss) of real and fake scores, minimised
    "classic-minimax": (lambda r, f: mean(sp(-r), sp(f)), lambda r, f: mean(-sp(f))),
    "classic-non-saturating": (lambda r, f: mean(sp(-r), sp(f)), lambda r, f: mean(sp(-f))),
    "classic-linear": (lambda r, f: mean(sp(-r), sp(f)), lambda r, f: mean(-f)),
    "wasserstein": (lambda r, f: mean(-r, f), lambda r, f: mean(-f)),
    "least-squares": (lambda r, f: mean((r - 1) ** 2, f**2), lambda r, f: mean((f - 1) ** 2)),
    "hinge": (lambda r, f: mean(plus(1 - r), plus(1 + f)), lambda r, f: mean(-f)),
    "hinge-non-saturating": (lambda r, f: mean(plus(1 - r), plus(1 + f)), lambda r, f: mean(sp(-f))),
    "hinge-minimax": (lambda r, f: mean(plus(1 - r), plus(1 + f)), lambda r, f: mean(-plus(1 + f))),
    "absolute": (lambda r, f: mean(abs(1 - r), abs(f)), lambda r, f: mean(abs(1 - f))),
    "asymmetric": (lambda r, f: mean(abs(r), f), lambda r, f: mean(-f)),
    "relativistic-average": (
        lambda r, f: mean(sp(-(r - f.mean())), sp(f - r.mean())),
        lambda r, f: mean(sp(-(f - r.mean())), sp(r - f.mean())),
    ),
    "relativistic-average-hinge": (
        lambda r, f: mean(plus(1 - (r - f.mean())), plus(1 + (f - r.mean()))),
        lambda r, f: mean(plus(1 - (f - r.mean())), plus(1 + (r - f.mean()))),
    ),
    "relativistic-pairing": (lambda r, f: mean(sp(-(r - f))), lambda r, f: mean(sp(-(f - r)))),
}
RELATIVISTIC = [name for name in LOSSES if name.startswith("relativistic")]
ALONE = [name for name in LOSSES if name not in RELATIVISTIC]


def both_losses(name, real, fake, **options):
    chosen = losses.loss(name, **options)
    return chosen.critic(real, fake), chosen.generator(fake, real)


def scores(*shape, dtype=torch.float64, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(shape or 8, generator=draws, dtype=torch.float64).to(dtype) for _ in range(2)]


def slopes(function, real, fake):
    """The gradient of a numpy function in both arguments by central differences, which are exact where it is piecewise
    quadratic and the scores lie far from its kinks."""
    results = []
    for i, argument in enumerate((real, fake)):
        result = np.zeros_like(argument)
        for j in range(len(argument)):
            values = []
            for step in (1 / 16, -1 / 16):
                moved = [real.copy(), fake.copy()]
                moved[i][j] += step
                values.append(function(*moved))
            result[j] = (values[0] - values[1]) * 8
        results.append(result)
    return results


def test_published_formulas_are_of_every_row():
    assert set(PUBLISHED) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_the_published_formulas(name, seed):
    real, fake = scores(seed=seed)
    for got, formula in zip(both_losses(name, real, fake), PUBLISHED[name], strict=True):
        assert got.shape == ()
        assert got.item() == pytest.approx(formula(real.numpy(), fake.numpy()), rel=1e-13)


def test_values_are_those_of_torch():
    real, fake = scores()
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    margin = F.margin_ranking_loss  # max(0, -target (x - y) + margin)
    classic = bce(real, one) + bce(fake, zero)
    hinge = margin(real, zero, one, 1.0) + margin(fake, zero, -one, 1.0)
    wanted = {
        "classic-minimax": (classic, -bce(fake, zero)),
        "classic-non-saturating": (classic, bce(fake, one)),
        "classic-linear": (classic, -fake.mean()),
        "least-squares": (F.mse_loss(real, one) + F.mse_loss(fake, zero), F.mse_loss(fake, one)),
        "hinge": (hinge, -fake.mean()),
        "hinge-non-saturating": (hinge, F.softplus(-fake).mean()),
        "hinge-minimax": (hinge, -margin(fake, zero, -one, 1.0)),
        "absolute": (F.l1_loss(real, one) + F.l1_loss(fake, zero), F.l1_loss(fake, one)),
        "relativistic-average": (
            bce(real - fake.mean(), one) + bce(fake - real.mean(), zero),
            bce(fake - real.mean(), one) + bce(real - fake.mean(), zero),
        ),
        "relativistic-pairing": (F.soft_margin_loss(real - fake, one), F.soft_margin_loss(fake - real, one)),
    }
    for name, values in wanted.items():
        torch.testing.assert_close(both_losses(name, real, fake), values, msg=name)


@pytest.mark.parametrize("epsilon", [0.5, 0.9, 1.1, 2.0])
@pytest.mark.parametrize("name", ["classic-minimax", "wasserstein", "hinge"])
def test_epsilon_weighs_the_real_side_of_the_critic_only(name, epsilon):
    real, fake = scores()
    critic, generator = both_losses(name, real, fake, epsilon=epsilon)
    f = {"classic-minimax": -sp(-real.numpy()), "wasserstein": real.numpy(), "hinge": -plus(1 - real.numpy())}[name]
    assert critic.item() == pytest.approx(PUBLISHED[name][0](real.numpy(), fake.numpy()) + mean((1 - epsilon) * f))
    assert generator.item() == pytest.approx(PUBLISHED[name][1](real.numpy(), fake.numpy()))


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_scores_of_ten_thousand(name, dtype):
    """Values and gradients are finite and right, also where real and fake are on the wrong sides."""
    sides = torch.tensor([1e4, -1e4, 1e4, -1e4, 30.0]), torch.tensor([1e4, 1e4, -1e4, -1e4, -30.0])
    real, fake = (side.to(dtype).requires_grad_() for side in sides)
    as_numpy = real.detach().double().numpy(), fake.detach().double().numpy()
    for got, formula in zip(both_losses(name, real, fake), PUBLISHED[name], strict=True):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(formula(*as_numpy), rel=1e-6)
        found = torch.autograd.grad(got, (real, fake), allow_unused=True)
        for gradient, wanted in zip(found, slopes(formula, *as_numpy), strict=True):
            if gradient is None:
                assert not wanted.any()
                continue
            assert gradient.dtype == dtype
            np.testing.assert_allclose(gradient.double().numpy(), wanted, rtol=TOLERANCE[dtype], atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_of_both_orders(name):
    real, fake = (y.requires_grad_() for y in scores(3, seed=1))
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda real, fake: both_losses(name, real, fake), (real, fake))


def test_minimax_that_is_really_non_saturating():
    """Where the critic is sure that a sample is fake, the minimax generator's gradient vanishes; the others' do
    not. And the zero-sum game is one: critic and generator are opposite in fake scores."""
    fake, real = torch.tensor([-20.0], requires_grad=True), torch.tensor([0.0])
    slope = {
        name: torch.autograd.grad(losses.loss(name).generator(fake), fake)[0].item()
        for name in LOSSES
        if name.startswith(("classic", "hinge"))
    }
    assert slope["classic-minimax"] == pytest.approx(-np.exp(-20), rel=1e-6)
    assert slope["hinge-minimax"] == 0
    for name in ("classic-non-saturating", "classic-linear", "hinge-non-saturating", "hinge"):
        assert slope[name] == pytest.approx(-1)
    fake = torch.randn(5, requires_grad=True)
    for name in ("classic-minimax", "hinge-minimax", "wasserstein"):
        game = losses.loss(name)
        against = torch.autograd.grad(game.critic(real, fake), fake)[0]
        torch.testing.assert_close(torch.autograd.grad(game.generator(fake), fake)[0], -against)


def test_log_of_sigmoid_overflowing():
    """log(sigmoid(y)) is -inf with gradient NaN where a critic is wrong by 200; these losses are 200 and -1."""
    y = torch.tensor([-200.0], requires_grad=True)
    naive = -y.sigmoid().log().mean()
    assert naive.isinf()
    assert torch.autograd.grad(naive, y)[0].isnan()
    for value in (
        losses.loss("classic-non-saturating").critic(y, torch.full((1,), -200.0)),
        losses.loss("classic-non-saturating").generator(y),
        losses.loss("relativistic-average").generator(y, torch.zeros(1)) - 200,
        losses.loss("relativistic-pairing").generator(y, torch.zeros(1)),
    ):
        assert value.item() == pytest.approx(200)
    assert torch.autograd.grad(losses.loss("classic-minimax").critic(y, y.detach()), y)[0].item() == -1


@pytest.mark.parametrize("name", RELATIVISTIC)
def test_relativistic_generators_swap_the_roles(name):
    real, fake = scores()
    chosen = losses.loss(name)
    assert chosen.needs_real
    torch.testing.assert_close(chosen.generator(fake, real), chosen.critic(fake, real))
    assert chosen.generator(fake, real) != chosen.critic(real, fake)


def test_relativistic_average_differentiates_the_mean_too():
    """A shift of all fake scores changes what the real ones are compared with."""
    real, fake = (y.requires_grad_() for y in scores())
    on_real, on_fake = torch.autograd.grad(losses.loss("relativistic-average").critic(real, fake), (real, fake))
    torch.testing.assert_close(on_real.sum(), -on_fake.sum())  # only differences count


@pytest.mark.parametrize("name", LOSSES)
def test_every_score_of_a_sample_counts_alike(name):
    flat = both_losses(name, *scores(12))
    for shape in ((12, 1), (12, 1, 1, 1), (2, 6), (3, 1, 2, 2)):
        torch.testing.assert_close(both_losses(name, *(y.view(shape) for y in scores(12))), flat)


def test_batches_of_two_sizes():
    real, fake = scores(6)[0], scores(9)[1]
    for name in ("hinge", "relativistic-average"):
        got = both_losses(name, real, fake)
        assert got[0].item() == pytest.approx(PUBLISHED[name][0](real.numpy(), fake.numpy()))
    with pytest.raises(ValueError, match="fake_scores: wanted 6 samples, each the partner of a real one, got 9"):
        losses.loss("relativistic-pairing").critic(real, fake)


@pytest.mark.parametrize("name", LOSSES)
def test_critics_that_are_low_on_real_samples(name):
    real, fake = scores()
    chosen = LOSSES[name]
    parts = chosen.f, chosen.g, chosen.h
    turned = losses.compose("turned", *parts, relation=chosen.relation, low_is_real=True)
    torch.testing.assert_close(turned.critic(-real, -fake), chosen.critic(real, fake))
    torch.testing.assert_close(turned.generator(-fake, -real), chosen.generator(fake, real))


def test_tables_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        LOSSES["mine"] = LOSSES["hinge"]
    with pytest.raises(AttributeError):
        LOSSES["hinge"].epsilon = 2.0
    assert all(row.doc for row in (*LOSSES.values(), *COMPONENTS.values()))
    used = {part.name for row in LOSSES.values() for part in (row.f, row.g, row.h)}
    assert used == set(COMPONENTS)
