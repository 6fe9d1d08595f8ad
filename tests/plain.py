"""Plain autograd, the oracle of the second-order engine: the usual snippet, and what counts as equal to it."""

import copy

import oracles
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkernels as gp


@pytest.fixture(autouse=True)
def float64_on_one_thread():
    """For the files that import it. Small tensors are slower on more threads, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


class Net(nn.Module):
    """forward(self, x) as a function, on modules given by name."""

    def __init__(self, call, **modules):
        super().__init__()
        self.call = call
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.call(self, x)


def scores_and_penalty(critic, x, form="squared", **kwargs):
    """What people write: the weight that r1 has, 5, for "squared", else 10."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        scores = critic(x, **kwargs)
    (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    weight = 5 if form == "squared" else 10
    return scores, weight * oracles.penalty(grad, form, 1.0, "l2", "sample", "mean")


def loss(scores, penalty):
    return scores.square().sum() + penalty


def gradients(value, inputs, **options):
    found = torch.autograd.grad(value, inputs, allow_unused=True, **options)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(inputs, found, strict=True)]


def kept_gradients(parameters):
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def assert_close(got, wanted, tolerance=None):
    """||got - wanted|| <= tolerance ||wanted|| for each, where a true gradient of zero counts as the largest."""
    exact = wanted[0].dtype == torch.float64
    tolerance = tolerance or (1e-12 if exact else 1e-5)
    norms = [w.double().norm() for w in wanted]
    largest = max(norms)
    for g, w, norm in zip(got, wanted, norms, strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        scale = norm if norm > largest * (1e-10 if exact else 1e-4) else largest
        error = (g.double() - w.double()).norm()
        assert error <= tolerance * scale, f"relative error {error / scale:.1e} of a gradient of shape {tuple(w.shape)}"


def outcome(run):
    """What `run` returns, or the exception it raises."""
    try:
        return run()
    except Exception as error:
        return error


def assert_same_outcome(got, wanted, tolerance=None):
    if isinstance(wanted, Exception):
        assert isinstance(got, Exception), f"plain torch raises {wanted!r}"
        return
    if isinstance(got, Exception):
        raise AssertionError(f"plain torch returns, this raised {type(got).__name__}: {got}") from got
    assert_close(got, wanted, tolerance)


def step(critic, x, both, ours, seed=3):
    """The value and the gradients after the backward of the penalty, or of `both` scores and penalty."""
    torch.manual_seed(seed)
    parameters = list(critic.parameters())
    if not ours:
        scores, penalty = scores_and_penalty(critic, x)
    elif both:
        scores, penalty = gp.score_and_penalty(critic, x, kind="r1")
    else:
        scores, penalty = None, gp.gradient_penalty(critic, x, kind="r1")
    value = loss(scores, penalty) if both else penalty
    value.backward()
    return [value.detach(), *kept_gradients(parameters)]


def assert_same_steps(make, x, tolerance=None):
    """gradient_penalty and score_and_penalty of make(), against plain autograd on another make(), and its buffers."""
    for both in (False, True):
        critics = []
        for _ in range(2):
            torch.manual_seed(1)
            critics.append(make())
        wanted = outcome(lambda: step(critics[0], x, both, ours=False))  # noqa: B023  called at once
        got = outcome(lambda: step(critics[1], x, both, ours=True))  # noqa: B023
        assert_same_outcome(got, wanted, tolerance)
        for a, b in zip(critics[0].buffers(), critics[1].buffers(), strict=True):
            assert torch.equal(a, b)


def assert_same_as_plain(critic, x, tolerance=None):
    assert_same_steps(lambda: copy.deepcopy(critic), x, tolerance)
