"""perturb: values, derivatives of every order (through the standard deviation too), layouts and errors."""

import oracles
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gpkernels as gp

SHAPES = [(1,), (5,), (3, 1), (2, 3, 1, 1), (3, 2, 5, 7), (2, 1, 150, 131)]


def generator():
    return torch.Generator().manual_seed(7)


def noise_like(x, noise):
    """The numbers that perturb adds at scale 1."""
    return gp.perturb(torch.zeros_like(x), scale=1.0, noise=noise, generator=generator())


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("noise", ["normal", "uniform"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value(backend, device, shape, noise, relative):
    real = torch.randn(shape, device=device) * 3 + 1
    out = gp.perturb(real, scale=0.5, noise=noise, relative=relative, generator=generator())
    sigma = real.double().std(correction=0) if relative else 1.0
    wanted = real.double() + 0.5 * sigma * noise_like(real, noise).double()
    assert oracles.relative_error(out, wanted) < 2e-7


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=str)
def test_low_precision(backend, device, dtype, tolerance):
    real = torch.randn(3, 50, device=device).to(dtype)
    noise = noise_like(real.float(), "normal")
    out = gp.perturb(real, scale=0.5, generator=generator())
    assert out.dtype == dtype
    assert oracles.relative_error(out, real.double() + 0.5 * noise.double()) < tolerance


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("noise", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 3, 2)], ids=str)
def test_first_and_second_derivative(backend, device, shape, noise, relative):
    real = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)

    def f(x):
        return gp.perturb(x, scale=0.7, noise=noise, relative=relative, generator=generator()) ** 3

    assert gradcheck(f, (real,))
    assert gradgradcheck(f, (real,))


def test_third_derivative(backend, device):
    real = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def first(x):
        out = gp.perturb(x, scale=0.7, relative=True, generator=generator()) ** 4
        return torch.autograd.grad(out.sum(), x, create_graph=True)[0]

    assert gradgradcheck(first, (real,))


def test_constant_batch_has_no_noise_and_no_nan(backend, device):
    real = torch.full((2, 3), 4.0, device=device, requires_grad=True)
    out = gp.perturb(real, scale=0.5, relative=True)
    assert torch.equal(out, real)
    (grad,) = torch.autograd.grad(out.sum(), real)
    assert torch.equal(grad, torch.ones_like(real))


def test_layouts(backend, device):
    real = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    out = gp.perturb(real, scale=1.0, generator=generator())
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, real + noise_like(real, "normal"))
    sliced = torch.randn(2, 3, 8, 5, device=device)[:, :, ::2]
    dense = gp.perturb(sliced.contiguous(), scale=1.0, generator=generator())
    assert torch.equal(gp.perturb(sliced, scale=1.0, generator=generator()), dense)


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gp.perturb(X, scale=-1.0), ValueError, "scale: wanted a finite number >= 0, got -1.0"),
        (lambda: gp.perturb(X, scale=float("nan")), ValueError, "scale: wanted a finite number"),
        (lambda: gp.perturb(X, scale="1"), TypeError, "scale: wanted a number, got str"),
        (lambda: gp.perturb(X, scale=1.0, noise="pink"), ValueError, "noise: wanted one of 'normal', 'uniform'"),
        (lambda: gp.perturb(X[:0], scale=1.0), ValueError, "real: wanted a non-empty batch"),
        (lambda: gp.perturb(X.long(), scale=1.0), TypeError, "real: wanted a floating-point tensor"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
