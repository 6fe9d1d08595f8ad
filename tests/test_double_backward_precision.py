"""Rows of the second-order engine's table where rounding decides: bounds that a dtype cannot hold, large means."""

import math

import pytest
import torch
import torch.nn.functional as F

import gpkernels as gp

BOUNDS = ((0.1, 0.9), (-0.3, 0.7), (-1 / 3, 1 / 3), (-1.0, 1.0), (0.0, 6.0), (0.1, 0.1), (0.1, math.inf))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_hardtanh_of_bounds_that_the_dtype_rounds(dtype, bounds, in_place):
    """At, beside and away from the bounds."""
    at = torch.tensor(bounds, dtype=torch.float64).to(dtype)
    near = [torch.nextafter(at, torch.full_like(at, to)) for to in (-math.inf, math.inf)]
    x = torch.cat([at, *near, torch.linspace(-2, 8, 200).to(dtype)])
    results = []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        leaf = x.clone().requires_grad_()
        with block:
            y = F.hardtanh(leaf * 1, *bounds, inplace=in_place)
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_hardtanh_under_autocast():
    torch.manual_seed(1)
    x, w = torch.randn(4, 3, 6, 6, dtype=torch.float32), torch.randn(4, 3, 3, 3, dtype=torch.float32)
    results = []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16), block:
            y = F.hardtanh(F.conv2d(*leaves), 0.1, 0.9)
        (g,) = torch.autograd.grad(y.float().square().sum(), leaves[0], create_graph=True)
        results.append([y, g, *torch.autograd.grad(g.square().sum(), leaves)])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).norm() <= 0.02 * wanted.norm()


def test_batch_norm_in_evaluation_is_as_precise_as_torch():
    """Far from zero, where x * scale and the mean's cancel."""
    torch.manual_seed(1)
    x = 1000 + torch.randn(64, 3, 4, 4, dtype=torch.float64)
    statistics = torch.full((3,), 1000.0), torch.full((3,), 1.0)
    weight, bias = torch.randn(2, 3, requires_grad=True)
    single = [t.float() for t in (*statistics, weight, bias)]
    for affine in (slice(None), slice(2), slice(3)):
        wanted = F.batch_norm(x.float().double(), *(t.double() for t in single[affine]))
        leaf = x.float().requires_grad_()
        plainly = F.batch_norm(leaf, *single[affine])
        with gp.fast_double_backward():
            ours = F.batch_norm(leaf, *single[affine])
        errors = [(y.double() - wanted).abs().max() for y in (plainly, ours)]
        assert ours.grad_fn.name() != plainly.grad_fn.name()
        assert errors[1] <= 1.5 * errors[0] + 1e-7
