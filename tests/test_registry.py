"""Choosing backends: preferences, explicit requests that never fall back, and reasons."""

import pytest
import torch

import gpkernels as gp
from gpkernels import registry
from gpkernels.ops.grad_penalty import penalties

X = torch.randn(4, 3)


def test_native_kernels_are_built_and_chosen():
    assert gp.why_not("cpu") is None
    for op in registry.ops():
        assert registry.choose(op, X).backend == "cpu"
        assert registry.choose(op, X.to("meta")).backend == "reference"


def test_explicit_request_never_falls_back():
    with gp.backend("cuda"), pytest.raises(gp.BackendError, match="'cuda' was requested but cannot run this call: "):
        gp.interpolate(X, X)
    with gp.backend("cpu"), pytest.raises(gp.BackendError, match="runs on cpu tensors, got one on meta"):
        gp.interpolate(X.to("meta"), X.to("meta"))
    with pytest.raises(ValueError, match=r"backend: wanted one of 'reference', 'cpu', 'triton', 'cuda', got 'tpu'"):
        gp.backend("tpu").__enter__()


def test_request_ends_with_its_block_and_nests():
    with gp.backend("reference"):
        with gp.backend("cpu"):
            assert registry.choose("interpolate", X).backend == "cpu"
        assert registry.choose("interpolate", X).backend == "reference"
    assert registry.choose("interpolate", X).backend == "cpu"


def test_backward_keeps_the_backend_of_its_forward(monkeypatch):
    called = []
    row = registry._rows["interpolate", "reference"]
    spy = registry.Implementation(
        "interpolate", "reference", row.supports, row.forward, lambda *a: called.append(1) or row.backward(*a)
    )
    monkeypatch.setitem(registry._rows, ("interpolate", "reference"), spy)
    real = X.clone().requires_grad_()
    with gp.backend("reference"):
        out = gp.interpolate(real, X)
    out.sum().backward()
    assert called == [1]


def test_why_not_gives_reasons():
    assert gp.why_not("cuda", "interpolate")
    assert "runs on cpu tensors, got one on meta" in gp.why_not("cpu", device="meta")
    assert gp.why_not("reference") is None
    with pytest.raises(ValueError, match="op: wanted one of"):
        gp.why_not("cpu", "fft")


def test_a_row_is_registered_once_and_validated():
    row = registry._rows["interpolate", "cpu"]
    with pytest.raises(ValueError, match="interpolate already has a cpu implementation"):
        registry.register(row)
    with pytest.raises(ValueError, match="backend: wanted one of"):
        registry.Implementation("interpolate", "tpu", row.supports, row.forward, row.backward)


@pytest.fixture
def cubic():
    """A user's own penalty, n^3, through the public registration; removed again afterwards."""
    penalties.register(penalties.Penalty("cubic", lambda n, k: n**3, lambda n, k: 3 * n**2, lambda n, k: 6 * n, "n^3"))
    yield
    del penalties.PENALTIES["cubic"], penalties._CODES["cubic"], penalties._ORDER[-1]


def test_a_new_penalty_works_everywhere_at_once(cubic):
    """Value, first and second derivative, on the reference, since no native kernel knows the row."""
    grad = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert registry.choose("grad_norm_penalty", grad, form=penalties.code_of("cubic")).backend == "reference"
    assert torch.autograd.gradcheck(lambda g: gp.grad_norm_penalty(g, form="cubic"), (grad,))
    assert torch.autograd.gradgradcheck(lambda g: gp.grad_norm_penalty(g, form="cubic"), (grad,))
    with gp.backend("cpu"), pytest.raises(gp.BackendError, match="have no row for the penalty 'cubic'"):
        gp.grad_norm_penalty(grad, form="cubic")


def test_a_new_penalty_trains_a_critic(cubic):
    critic = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    values = []
    for _ in range(60):
        penalty = gp.gradient_penalty(critic, X, kind="r1", form="cubic")
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        values.append(penalty.item())
    assert values[-1] < values[0] / 10


def test_a_taken_penalty_name_is_refused():
    with pytest.raises(ValueError, match="name: wanted a new one, got 'linear', which is taken"):
        penalties.register(penalties.PENALTIES["linear"])
