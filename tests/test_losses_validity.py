"""Which losses are valid: psi against its closed forms, y* and its slope by hand, and what is said of bad ones."""

import math

import numpy as np
import pytest
import torch
from threads import one_thread  # noqa: F401

from gpkernels import losses
from gpkernels.losses import LOSSES, examine
from gpkernels.losses.validity import psi

GAMMA = torch.tensor([0.05, 0.2, 1 / 3, 0.499, 0.5, 0.501, 0.7, 0.95], dtype=torch.float64)


def entropy(a, b):
    """max over s of a log s + b log(1 - s)."""
    return a * np.log(a / (a + b)) + b * np.log(b / (a + b))


CLOSED = {  # psi(gamma), with c = 1 - gamma
    "classic-minimax": entropy,
    "wasserstein": lambda a, c: np.where(a == c, 0, np.inf),
    "least-squares": lambda a, c: -a * c,
    "hinge": lambda a, c: -2 * np.minimum(a, c),
    "absolute": lambda a, c: -np.minimum(a, c),
    "asymmetric": lambda a, c: np.where(a >= c, 0, np.inf),
}
Y_STAR = {  # y*, f'(y*)
    "classic-minimax": (0, 0.5),
    "classic-non-saturating": (0, 0.5),
    "classic-linear": (0, 0.5),
    "wasserstein": (0, 1),
    "least-squares": (0.5, 1),
    "hinge": (0, 1),
    "hinge-non-saturating": (0, 1),
    "hinge-minimax": (0, 1),
    "absolute": (0.5, 1),
}


@pytest.mark.parametrize("name", CLOSED)
def test_psi_is_its_closed_form(name):
    row = LOSSES[name]
    wanted = CLOSED[name](GAMMA.numpy(), 1 - GAMMA.numpy())
    np.testing.assert_allclose(psi(row.f, row.g, GAMMA).numpy(), wanted, atol=1e-10)


@pytest.mark.parametrize("name", Y_STAR)
def test_valid_rows(name):
    found = examine(LOSSES[name].f, LOSSES[name].g)
    assert (found.y_star, found.slope) == pytest.approx(Y_STAR[name], abs=1e-9)
    assert found.least == pytest.approx((0.5, 0.5), abs=1e-3)
    assert (found.concave, found.finite, found.valid, found.mean_valid, found.reasons) == (True, True, True, True, ())


def test_the_one_row_that_is_not_valid():
    """asymmetric: psi is 0 from 1/2 to 1. Over all samples, some of which lie below 1/2, its gain still is least only
    where the distributions are equal."""
    assert {name for name, row in LOSSES.items() if not row.needs_real} - set(Y_STAR) == {"asymmetric"}
    found = examine(LOSSES["asymmetric"].f, LOSSES["asymmetric"].g)
    assert (found.concave, found.y_star, found.least) == (True, None, (0.5, 1.0))
    assert (found.valid, found.mean_valid) == (False, True)
    assert found.reasons == ("at y = 0, where f = g, f has a kink", "psi is least at gamma = 0.5 to 1")


@pytest.mark.parametrize("epsilon", [0.5, 0.9, 1.1, 2.0])
def test_epsilon_breaks_wasserstein_and_hinge_and_tilts_classic(epsilon):
    """Wasserstein: psi(1/2) is infinite. Hinge: psi has its kink at 1 / (1 + epsilon) and is linear across 1/2, so
    that nothing holds the distributions together there. Classic: psi moves, but stays strictly convex."""
    found = {name: examine(LOSSES[name].f, LOSSES[name].g, epsilon=epsilon) for name in CLOSED}
    assert not any(result.valid or result.y_star is not None for result in found.values() if result.concave)
    assert not found["wasserstein"].finite
    assert "psi(1/2) is infinite" in found["wasserstein"].reasons[-1]
    assert found["hinge"].least == pytest.approx((1 / (1 + epsilon),) * 2, abs=1e-3)
    assert found["hinge"].finite
    assert not found["wasserstein"].mean_valid
    assert not found["hinge"].mean_valid
    share = np.linspace(0.01, 0.99, 9801)
    least = share[entropy(epsilon * share, 1 - share).argmin()]
    assert found["classic-minimax"].least == pytest.approx((least, least), abs=1e-3)
    assert found["classic-minimax"].mean_valid
    row = LOSSES["classic-minimax"]
    wanted = entropy(epsilon * GAMMA.numpy(), 1 - GAMMA.numpy())
    np.testing.assert_allclose(psi(row.f, row.g, GAMMA, epsilon=epsilon).numpy(), wanted, atol=1e-10)


@pytest.mark.parametrize(
    ("f", "g", "y_star", "slope"),
    [
        ("log(y)", "log(1 - y)", 0.5, 2.0),  # a critic that ends in a sigmoid
        ("-exp(-y)", "-exp(y)", 0.0, 1.0),
        ("-(y - 200)^2", "-y^2", 100.0, 200.0),
        ("1e-6 * min(0, y - 1)", "1e-6 * min(0, -y - 1)", 0.0, 1e-6),
        ("-(y - 1)^4", "-y^4", 0.5, 0.5),
        ("-(y - 2e5)^2", "-y^2", 1e5, 2e5),
        ("-softplus(-3*(y - 0.123456))", "-softplus(3*(y - 0.123456))", 0.123456, 1.5),
        ("tanh(y)", "-tanh(y)", 0.0, 1.0),
        (lambda y: -torch.nn.functional.softplus(-y), lambda y: -torch.nn.functional.softplus(y), 0.0, 0.5),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", None),
)
def test_other_valid_pairs(f, g, y_star, slope):
    with torch.no_grad():  # which must not matter
        found = examine(f, g)
    assert (found.valid, found.concave, found.reasons) == (True, True, ())
    assert (found.y_star, found.slope) == pytest.approx((y_star, slope), abs=1e-8)


@pytest.mark.parametrize(
    ("f", "g", "reasons"),
    [
        ("y^2", "-y", ["f'' + g'' > 0 at y = ", "f' + g' = -1, not 0", "psi(1/2) is infinite"]),
        ("abs(y) - y^2", "-abs(y) / 2", ["f'' + g'' > 0 at y = 0: f' + g' rises from 0 to 0.48", "f has a kink"]),
        ("1", "0", ["f and g are equal nowhere", "psi is least at gamma = 0"]),
        ("-y^2", "-y^2", ["at y = 0, where f = g, f' = g' = 0, a slope was wanted", "psi is least at gamma = 0 to 1"]),
        ("-y^2", "-(y + 2)^2 + 1", ["at y = -0.75, where f = g, f' + g' = -1, not 0", "psi is least at gamma ="]),
        ("y", "-2 * y", ["at y = 0, where f = g, f' + g' = -1, not 0", "psi(1/2) is infinite"]),
        ("-y^2", "-y^2 - min(y, 0) - relu(y) / 2", ["at y = 0, where f = g, g has a kink", "psi is least at gamma ="]),
    ],
    ids=str,
)
def test_invalid_pairs_are_explained(f, g, reasons):
    found = examine(f, g)
    assert not found.valid
    assert found.y_star is None
    assert len(found.reasons) >= len(reasons)
    for wanted in reasons:
        assert any(wanted in reason for reason in found.reasons), found.reasons


def test_a_convex_bend_between_conditions_that_hold():
    """y* = 0 is as it should be, and a dent at 3 makes f + g larger there than at 0."""
    found = examine("-softplus(-y)", "-softplus(y) + 10 * exp(-(y - 3)^2)")
    assert not found.concave
    assert not found.valid
    assert found.reasons[0].startswith("f'' + g'' > 0 at y = ")


def test_valid_though_the_conditions_fail():
    """They are sufficient only: steps have no slope, but psi is that of Wasserstein, less 1/2."""
    found = examine(torch.floor, lambda y: -torch.floor(y) - 1)
    assert (found.valid, found.y_star) == (True, None)
    assert found.reasons == ("f and g are equal nowhere: they jump past each other at y = 0",)


def test_psi_of_a_domain_and_of_the_whole_line():
    np.testing.assert_allclose(
        psi("log(y)", "log(1 - y)", GAMMA).numpy(), entropy(GAMMA.numpy(), 1 - GAMMA.numpy()), atol=1e-9
    )
    assert psi("log(abs(y))", "0", GAMMA).isinf().all()
    assert psi("atan(y)", "-atan(y)", torch.tensor([1.0])).item() == pytest.approx(math.pi / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("y +", "-y"), {}, ValueError, "f: wanted a formula in y, got 'y \\+'"),
        (("y", "-sp(y)"), {}, ValueError, "g: wanted a formula of y, .* got 'sp\\(y\\)' in '-sp\\(y\\)'"),
        (("y", 3), {}, TypeError, "g: wanted a component's name, a formula in y or a function, got int"),
        (("y", torch.sum), {}, ValueError, r"g: wanted a value a score, shape \(\d+,\), got \(\)"),
        ((lambda y: 2.0, "-y"), {}, ValueError, "f: wanted a value a score, .* got float"),
        (("log(-1 - y^2)", "-y"), {}, ValueError, "f, g: wanted finite values and slopes somewhere"),
        (("y", "-y"), {"epsilon": 0.0}, ValueError, "epsilon: wanted a number > 0, got 0"),
        (("y", "-y"), {"epsilon": math.inf}, ValueError, "epsilon: wanted a finite number, got inf"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        losses.examine(*arguments, **options)
