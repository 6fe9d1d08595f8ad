"""Losses composed by the user, from formulas and functions; what is refused, by name."""

import numpy as np
import pytest
import torch
from threads import one_thread  # noqa: F401

from gpkernels import losses
from gpkernels.losses import COMPONENTS, LOSSES, expressions


def sp(y):
    return np.logaddexp(0, y)


def plus(y):
    return np.maximum(0, y)


def scores():
    return [3 * torch.randn(8, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_what_its_name_spells(name):
    y = torch.linspace(-6, 6, 97, dtype=torch.float64)
    torch.testing.assert_close(COMPONENTS[name].function(y), expressions.parse(name)(y))


FORMULAS = {
    "y": lambda y: y,
    "2": lambda y: 2 + 0 * y,
    "-y^2 + 3*y - 1/2": lambda y: -(y**2) + 3 * y - 0.5,
    "2^y": lambda y: 2.0**y,
    "+(y - 2)**-2": lambda y: (y - 2) ** -2.0,
    "min(y, 0.5) * max(-1, y)": lambda y: np.minimum(y, 0.5) * np.maximum(-1, y),
    "softplus(y) + logsigmoid(y)": lambda y: sp(y) - sp(-y),
    "sigmoid(y) + tanh(y) + atan(y)": lambda y: 1 / (1 + np.exp(-y)) + np.tanh(y) + np.arctan(y),
    "exp(y) - expm1(y) + log1p(abs(y))": lambda y: 1 + np.log1p(abs(y)),
    "sin(y)^2 + cos(y)^2": lambda y: 1 + 0 * y,
    "relu(y) + sqrt(abs(y)) + log(abs(y) + 1)": lambda y: plus(y) + abs(y) ** 0.5 + np.log(abs(y) + 1),
}


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas(text):
    y = torch.linspace(-3, 3, 14, dtype=torch.float64).view(2, 7)
    np.testing.assert_allclose(expressions.parse(text)(y).numpy(), FORMULAS[text](y.numpy()), rtol=1e-12)


def test_every_function_of_formulas_is_tried_above():
    assert all(any(f"{name}(" in text for text in FORMULAS) for name in expressions.FUNCTIONS)


@pytest.mark.parametrize(
    "text",
    [
        *("", "y +", "x", "y.sum()", "sp(y)", "'y'", "1j", "True", "[y]", "import os", "__import__('os')", "lambda: y"),
        *("min(y)", "exp(y, y)", "exp(x=y)", "y if y else 1", "y == 1", "not y", "y // 2", "y @ y"),
        "(" * 300 + "y" + ")" * 300,
        "y" + " + y" * 20000,
        "1" + "0" * 400,
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_a_formula_is_refused(text):
    with pytest.raises(ValueError, match="f: wanted a formula"):
        losses.compose("mine", text, "-y", "-y")


def test_a_composed_loss():
    """RaLSGAN, which the table lacks, from formulas, and the same from functions."""
    real, fake = scores()
    spelled = losses.compose("ra-least-squares", "-(y - 1)^2", "-(y + 1)^2", "(y - 1)^2", relation="average")
    written = losses.compose(
        "ra-least-squares",
        lambda y: -((y - 1) ** 2),
        lambda y: -((y + 1) ** 2),
        lambda y: (y - 1) ** 2,
        relation="average",
    )
    a, b = real.numpy() - fake.numpy().mean(), fake.numpy() - real.numpy().mean()
    for mine in (spelled, written):
        assert mine.critic(real, fake).item() == pytest.approx(np.mean((a - 1) ** 2) + np.mean((b + 1) ** 2))
        assert mine.generator(fake, real).item() == pytest.approx(np.mean((b - 1) ** 2) + np.mean((a + 1) ** 2))


def test_a_composed_loss_from_the_rows_of_another():
    mine = losses.compose("mine", LOSSES["hinge"].f, LOSSES["least-squares"].g, "-y", epsilon=0.5, doc="a mixture")
    real, fake = scores()
    wanted = np.mean(0.5 * plus(1 - real.numpy())) + np.mean(fake.numpy() ** 2)
    assert mine.critic(real, fake).item() == pytest.approx(wanted)
    assert (mine.name, mine.doc, mine.f) == ("mine", "a mixture", COMPONENTS["min(0, y - 1)"])


def critic_of(f, real=None, fake=None):
    chosen = losses.compose("mine", f, "-y", "-y") if f else losses.loss("hinge")
    return chosen.critic(*(torch.zeros(3) if y is None else y for y in (real, fake)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: losses.loss("vae"), ValueError, "name: wanted one of 'classic-minimax', .*, got 'vae'"),
        (lambda: losses.loss("hinge", epsilon=0), ValueError, "epsilon: wanted a number > 0, got 0"),
        (lambda: losses.loss("hinge", epsilon="1"), TypeError, "epsilon: wanted a number, got str"),
        (
            lambda: losses.loss("relativistic-average", epsilon=2.0),
            ValueError,
            "epsilon: wanted 1 for a relativistic loss",
        ),
        (lambda: losses.compose("mine", "y", "-y", 3), TypeError, "h: wanted a component's name, .*, got int"),
        (
            lambda: losses.compose("mine", "y", "-y", "-y", relation="mean"),
            ValueError,
            "relation: wanted one of",
        ),
        (lambda: losses.Loss("mine", "y", "-y", "-y"), TypeError, "f: wanted a Component"),
        (lambda: critic_of(torch.mean), ValueError, r"f: wanted a value a score, shape \(3, 1\), got \(\)"),
        (lambda: critic_of(lambda y: 1.0), TypeError, "f: wanted a function that returns a torch.Tensor, got float"),
        (lambda: critic_of(None, torch.tensor(1.0)), ValueError, "real_scores: wanted a batch dimension"),
        (lambda: critic_of(None, fake=torch.zeros(3, dtype=torch.int64)), TypeError, "fake_scores: wanted a floating"),
        (lambda: critic_of(None, fake=torch.zeros(0)), ValueError, "fake_scores: wanted a non-empty batch"),
        (lambda: critic_of(None, fake=torch.zeros(3, 4)), ValueError, "fake_scores: wanted 1 scores a sample"),
        (
            lambda: losses.loss("relativistic-pairing").generator(torch.zeros(3)),
            ValueError,
            "real_scores: wanted the scores of real samples, which 'relativistic-pairing' compares with, got None",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
