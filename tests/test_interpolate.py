"""interpolate: values, derivatives of every order, layouts, dtypes and errors, on every backend."""

import oracles
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gpkernels as gp

SHAPES = [(1,), (5,), (3, 1), (2, 3, 1, 1), (3, 2, 5, 7), (2, 3, 2, 4, 3), (2, 1, 150, 131)]
SMALL = [(1,), (3, 2), (2, 3, 3, 2)]


def generator():
    return torch.Generator().manual_seed(7)


def drawn_eps(shape, per_element):
    """The eps that `generator()` gives, from the oracle's words."""
    seed = torch.randint(2**63 - 1, (2,), generator=generator())
    count = torch.Size(shape).numel() if per_element else shape[0]
    eps = torch.tensor([word >> 8 for word in oracles.words(seed, count)], dtype=torch.float64) * 2.0**-24
    return eps.reshape(shape) if per_element else eps.reshape(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drawn(backend, device, shape, per_element):
    real, fake = torch.randn(shape, device=device), torch.randn(shape, device=device)
    out = gp.interpolate(real, fake, per_element=per_element, generator=generator())
    eps = drawn_eps(shape, per_element).to(device)
    wanted = eps * real.double() + (1 - eps) * fake.double()
    assert oracles.relative_error(out, wanted) < 2e-7
    assert out.dtype == real.dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-15), (torch.float32, 1e-7), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
    ids=str,
)
def test_given_eps(backend, device, shape, dtype, tolerance):
    """Computed in the accumulation dtype and rounded once: half an ulp of the result's dtype, in norm."""
    real, fake = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    eps = torch.rand(shape[0], dtype=torch.float64, device=device)
    out = gp.interpolate(real, fake, eps=eps)
    stored = eps if dtype == torch.float64 else eps.float().double()
    weight = stored.reshape(-1, *[1] * (len(shape) - 1))
    assert oracles.relative_error(out, weight * real.double() + (1 - weight) * fake.double()) < tolerance
    assert out.dtype == dtype
    assert torch.equal(gp.interpolate(real, fake, eps=eps.reshape(weight.shape)), out)


def test_ends(backend, device):
    real, fake = torch.randn(2, 5, device=device), torch.randn(2, 5, device=device)
    out = gp.interpolate(real, fake, eps=torch.tensor([1.0, 0.0], device=device))
    assert torch.equal(out, torch.stack([real[0], fake[1]]))


@pytest.mark.parametrize("mode", ["given", "sample", "element"])
@pytest.mark.parametrize("wrt", ["both", "real", "fake"])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_first_and_second_derivative(backend, device, shape, mode, wrt):
    eps = torch.rand(shape[0], dtype=torch.float64, device=device) if mode == "given" else None
    real, fake = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2))
    inputs = {"both": (real, fake), "real": (real,), "fake": (fake,)}[wrt]
    for x in inputs:
        x.requires_grad_()

    def f(*_):
        per_element = mode == "element"
        return (
            gp.interpolate(
                real, fake, eps=eps, per_element=per_element, generator=None if eps is not None else generator()
            )
            ** 3
        )

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_third_derivative(backend, device):
    real = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    fake = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def first(real, fake):
        out = gp.interpolate(real, fake, per_element=True, generator=generator()) ** 4
        return torch.autograd.grad(out.sum(), (real, fake), create_graph=True)

    assert gradgradcheck(first, (real, fake))


def test_gradient_in_another_layout_than_the_output(backend, device):
    """Numbers go by the output's memory order, also where the gradient that comes back is laid out differently."""
    real = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = gp.interpolate(real, torch.zeros_like(real), per_element=True, generator=generator())
    ones = torch.ones(2, 3, 4, 5, device=device)
    (grad,) = torch.autograd.grad(out, real, ones)
    eps = gp.interpolate(torch.ones_like(real), torch.zeros_like(real), per_element=True, generator=generator())
    assert torch.equal(grad, eps)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1),
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=["channels_last", "transposed_batch", "permuted", "sliced", "expanded"],
)
def test_strided_inputs(backend, device, view):
    real, fake = view(torch.randn(3, 3, 6, 5, device=device)), view(torch.randn(3, 3, 6, 5, device=device))
    eps = torch.rand(real.shape[0], device=device)
    weight = eps.reshape(-1, 1, 1, 1)
    wanted = weight * real + (1 - weight) * fake
    torch.testing.assert_close(gp.interpolate(real, fake, eps=eps), wanted)
    torch.testing.assert_close(gp.interpolate(real, fake.contiguous(), eps=eps), wanted)


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gp.interpolate([1.0], X), TypeError, "real: wanted a torch.Tensor, got list"),
        (lambda: gp.interpolate(X.int(), X), TypeError, "real: wanted a floating-point tensor, got torch.int32"),
        (lambda: gp.interpolate(X, X[:, :2]), ValueError, r"fake: wanted the shape of real, \(4, 3\), got \(4, 2\)"),
        (lambda: gp.interpolate(X, X.double()), ValueError, "fake: wanted the dtype of real, torch.float32"),
        (lambda: gp.interpolate(X, X.to("meta")), ValueError, "fake: wanted the device of real, cpu, got meta"),
        (lambda: gp.interpolate(X[:0], X[:0]), ValueError, r"real: wanted a non-empty batch, got shape \(0, 3\)"),
        (lambda: gp.interpolate(X[0, 0], X[0, 0]), ValueError, "real: wanted a batch dimension"),
        (lambda: gp.interpolate(X, X, eps=X), ValueError, r"eps: wanted shape \(4,\) or \(4, 1, ..., 1\)"),
        (lambda: gp.interpolate(X, X, eps=torch.rand(4, requires_grad=True)), ValueError, "eps: wanted a constant"),
        (lambda: gp.interpolate(X, X, eps=torch.rand(4), per_element=True), ValueError, "per_element: wanted False"),
        (lambda: gp.interpolate(X.to_sparse(), X), TypeError, "real: wanted a dense"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
