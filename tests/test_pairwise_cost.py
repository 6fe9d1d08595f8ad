"""pairwise_cost: values, derivatives, layouts, dtypes, ends and errors, on every backend."""

import math

import numpy as np
import oracles
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gpkernels as gp

SHAPES = [(1,), (5,), (3, 1), (1, 1, 1, 1), (2, 3, 1, 1), (3, 2, 5, 7), (2, 3, 2, 4, 3), (20_000, 3), (2, 1, 150, 131)]
SLOPES = (1.0, 0.0, -1.0, 0.3, -2.0)
VIEWS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed_batch": lambda x: x.transpose(0, 1),
    "permuted": lambda x: x.permute(0, 3, 1, 2),
    "sliced": lambda x: x[:, :, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


def plain(real, fake, loss_real, loss_fake, margin, slope):
    """The formula as one writes it."""
    delta = margin * (real - fake).detach().abs().flatten(1).sum(1)
    a = delta + loss_real.flatten() - loss_fake.flatten()
    return torch.maximum(a, slope * a), delta


def pairs(shape, device, dtype=torch.float32):
    """Samples and losses for which, with a margin of 0.7 / elements, a has either sign."""
    real, fake = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    losses = (torch.randn(shape[0], device=device, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    return real, fake, *(loss.requires_grad_() for loss in losses)


def margin_of(shape):
    return 0.7 / max(1, torch.Size(shape[1:]).numel())


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value(backend, device, shape, slope):
    inputs = pairs(shape, device)
    cost, delta = gp.pairwise_cost(*inputs, margin=margin_of(shape), slope=slope)
    wanted = plain(*(x.unsqueeze(1).double() for x in inputs), margin_of(shape), slope)
    for got, other in zip((cost, delta), wanted, strict=True):
        assert (got.shape, got.dtype) == ((shape[0],), torch.float32)
        torch.testing.assert_close(got.double(), other, rtol=1e-6, atol=1e-6)


def test_default_is_the_ls_gan(backend, device):
    """lambda 2e-4 and a hinge, against sums in numpy."""
    real, fake, loss_real, _ = (x.detach() for x in pairs((4, 3, 64, 64), device))
    loss_fake = torch.tensor([0.0, 2.0, 10.0, 20.0], device=device)
    cost, delta = gp.pairwise_cost(real, fake, loss_real, loss_fake)
    r, f, lr, lf = (x.double().cpu().numpy() for x in (real, fake, loss_real, loss_fake))
    distance = np.abs(r - f).sum((1, 2, 3))
    np.testing.assert_allclose(delta.cpu(), 2e-4 * distance, rtol=1e-6)
    np.testing.assert_allclose(cost.cpu(), np.maximum(0, 2e-4 * distance + lr - lf), rtol=1e-6, atol=1e-6)
    assert (cost > 0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("shape", [(1,), (3, 2), (4, 3, 3, 2)], ids=str)
def test_gradcheck_and_gradgradcheck(backend, device, shape, slope):
    real, fake, *losses = pairs(shape, device, torch.float64)

    def f(*losses):
        return gp.pairwise_cost(real, fake, *losses, margin=margin_of(shape), slope=slope)

    assert gradcheck(f, losses)
    assert gradgradcheck(f, losses)
    for one in range(2):
        fixed = [loss.detach() for loss in losses]

        def of_one(loss, one=one, fixed=fixed):
            return f(*fixed[:one], loss, *fixed[one + 1 :])[0].pow(3)

        assert gradgradcheck(of_one, (losses[one],))


def test_third_derivative(backend, device):
    """Through a cube, so that no order is zero."""
    real, fake, *losses = pairs((4, 3), device, torch.float64)

    def first(*losses):
        cost, _ = gp.pairwise_cost(real, fake, *losses, margin=0.2, slope=-0.5)
        return torch.autograd.grad(cost.pow(4).sum(), losses, create_graph=True)

    assert gradgradcheck(first, losses)


def test_derivatives_equal_plain_autograd(backend, device):
    """First derivative, and second in the incoming gradient, also where only one of the two tangents is there."""
    real, fake, *losses = pairs((6, 2, 3), device, torch.float64)
    upstream = torch.linspace(0.5, 2, 6, dtype=torch.float64, device=device, requires_grad=True)
    for slope in SLOPES:
        results = []
        for f in (gp.pairwise_cost, plain):
            options = {"margin": 0.1, "slope": slope}
            first = torch.autograd.grad(f(real, fake, *losses, **options)[0], losses, upstream, create_graph=True)
            tangent = torch.arange(1.0, 7.0, dtype=torch.float64, device=device)
            second = [
                torch.autograd.grad(way, upstream, tangent, retain_graph=True)[0]
                for way in (first[0], first[1], first[0] * first[1])
            ]
            results.append((*first, *second))
        for got, wanted in zip(*results, strict=True):
            assert oracles.relative_error(got, wanted) < 1e-14


def test_slope_at_zero_is_one(backend, device):
    """C'(0) = 1 by definition, whichever the slope: a is 0 without a margin, without a distance, and by difference."""
    x, one = torch.randn(3, 4, device=device), torch.ones(3, 4, device=device)
    loss = torch.ones(3, device=device, requires_grad=True)
    for slope in SLOPES:
        for real, fake, margin, other in ((x, -x, 0.0, 1.0), (x, x, 0.5, 1.0), (one, -one, 0.25, 3.0)):
            loss_fake = torch.full((3,), other, device=device)
            cost, _ = gp.pairwise_cost(real, fake, loss, loss_fake, margin=margin, slope=slope)
            assert cost.tolist() == [0.0] * 3
            assert torch.autograd.grad(cost.sum(), loss)[0].tolist() == [1.0] * 3


def test_samples_get_no_gradient(backend, device):
    """delta is a constant; the gradient that fake gets is the one through the critic."""
    real, fake, loss_real, _ = pairs((3, 4), device, torch.float64)
    real.requires_grad_(), fake.requires_grad_()
    cost, delta = gp.pairwise_cost(real, fake, loss_real, fake.square().sum(1), margin=0.5, slope=-1.0)
    assert not delta.requires_grad
    assert torch.autograd.grad(cost.sum(), real, allow_unused=True, retain_graph=True) == (None,)
    (through_critic,) = torch.autograd.grad(cost.sum(), fake, retain_graph=True)
    (slope,) = torch.autograd.grad(cost.sum(), loss_real)
    torch.testing.assert_close(through_critic, -2 * fake * slope.unsqueeze(1))
    cost, _ = gp.pairwise_cost(real, fake, loss_real.detach(), loss_real.detach())
    assert not cost.requires_grad


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_layouts(backend, device, view):
    """Both samples of one layout, and mixed."""
    real, fake = (view(torch.randn(3, 3, 6, 5, device=device)) for _ in range(2))
    losses = [torch.randn(real.shape[0], device=device) for _ in range(2)]
    wanted = plain(real, fake, *losses, 0.01, 0.0)
    for pair in ((real, fake), (real.contiguous(), fake), (real, fake.contiguous())):
        torch.testing.assert_close(gp.pairwise_cost(*pair, *losses, margin=0.01), wanted)


def test_losses_of_any_stride(backend, device):
    real, fake = torch.randn(2, 4, 3, device=device)
    losses = torch.randn(4, 2, device=device, requires_grad=True)
    cost, _ = gp.pairwise_cost(real, fake, losses[:, 0], losses[:, 1].unsqueeze(1), margin=0.1, slope=0.5)
    wanted, _ = plain(real, fake, losses[:, 0], losses[:, 1], 0.1, 0.5)
    torch.testing.assert_close(cost, wanted)
    expanded = torch.ones((), device=device).expand(4)
    grads = [torch.autograd.grad(c, losses, expanded)[0] for c in (cost, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_accumulates_in_float32(backend, device, dtype):
    """65,536 elements and losses of the same dtype: as exact as float32, the gradient in the losses' dtype."""
    real, fake = (torch.randn(2, 4, 128, 128, device=device).to(dtype) for _ in range(2))
    losses = [torch.tensor([[[[1.0]]], [[[-3.0]]]], device=device).to(dtype).requires_grad_() for _ in range(2)]
    cost, delta = gp.pairwise_cost(real, fake, *losses, margin=1e-5, slope=0.3)
    assert cost.dtype == delta.dtype == torch.float32
    wanted = plain(*(x.double() for x in (real, fake, *losses)), 1e-5, 0.3)
    assert oracles.relative_error(cost, wanted[0]) < 1e-6
    assert oracles.relative_error(delta, wanted[1]) < 1e-6
    grads = torch.autograd.grad(cost.sum(), losses)
    assert [(g.dtype, g.shape) for g in grads] == [(dtype, (2, 1, 1, 1))] * 2
    assert [g.flatten().tolist() for g in grads] == [[1.0, 1.0], [-1.0, -1.0]]


def test_float64_stays_float64(backend, device):
    real, fake, *losses = pairs((3, 50), device, torch.float64)
    got = gp.pairwise_cost(real, fake, losses[0].float(), losses[1], margin=0.01, slope=-1.0)
    wanted = plain(real, fake, losses[0].float().double(), losses[1], 0.01, -1.0)
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(4), ids=["real", "fake", "loss_real", "loss_fake"])
@pytest.mark.parametrize("elements", [40, 20_000])
def test_nan_and_inf_stay_visible(backend, device, bad, where, elements):
    """They reach their pair as they do in plain torch, and no other pair."""
    inputs = [torch.ones(3, elements, device=device), torch.zeros(3, elements, device=device)]
    inputs += [torch.zeros(3, device=device, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        inputs[where][(1, elements - 7) if where < 2 else 1] = bad
    for slope in (0.3, -1.0, 1.0):
        results = []
        for f in (gp.pairwise_cost, plain):
            cost, delta = f(*inputs, margin=1 / elements, slope=slope)
            results.append((cost, delta, torch.autograd.grad(cost[::2].sum(), inputs[2])[0]))
        torch.testing.assert_close(*results, equal_nan=True)
        assert not results[0][0][1].isfinite()
    cost, _ = gp.pairwise_cost(*inputs, margin=1 / elements)
    assert not cost[1].isfinite()
    assert cost[::2].tolist() == pytest.approx([1.0, 1.0])


def test_same_bits_every_time(backend, device):
    inputs = pairs((3, 1, 150, 131), device)
    first, again = (gp.pairwise_cost(*inputs, margin=0.01)[1] for _ in range(2))
    assert torch.equal(first, again)


def test_sums_do_not_depend_on_the_number_of_threads():
    inputs = pairs((3, 1, 150, 131), "cpu")
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(gp.pairwise_cost(*inputs, margin=0.01)[1])
    torch.set_num_threads(threads)
    assert torch.equal(*results)


X, L = torch.randn(4, 3), torch.randn(4)
pairwise_cost = gp.pairwise_cost


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pairwise_cost([1.0], X, L, L), TypeError, "real: wanted a torch.Tensor, got list"),
        (lambda: pairwise_cost(X.int(), X, L, L), TypeError, "real: wanted a floating-point tensor, got torch.int"),
        (lambda: pairwise_cost(X, X[:, :2], L, L), ValueError, r"fake: wanted the shape of real, \(4, 3\), got"),
        (lambda: pairwise_cost(X, X.double(), L, L), ValueError, "fake: wanted the dtype of real, torch.float32"),
        (lambda: pairwise_cost(X, X.to("meta"), L, L), ValueError, "fake: wanted the device of real, cpu, got meta"),
        (lambda: pairwise_cost(X[:0], X[:0], L[:0], L[:0]), ValueError, "real: wanted a non-empty batch"),
        (lambda: pairwise_cost(X[:, :0], X[:, :0], L, L), ValueError, "real: wanted a non-empty batch"),
        (lambda: pairwise_cost(X, X, L[:3], L), ValueError, r"loss_real: wanted shape \(4,\) or \(4, 1, ..., 1\), g"),
        (lambda: pairwise_cost(X, X, L, X), ValueError, r"loss_fake: wanted shape \(4,\) .*, got shape \(4, 3\)"),
        (lambda: pairwise_cost(X, X, L.mean(), L), ValueError, "loss_real: wanted a batch dimension"),
        (lambda: pairwise_cost(X, X, L[None], L), ValueError, r"loss_real: wanted shape .*, got shape \(1, 4\)"),
        (lambda: pairwise_cost(X, X, L.long(), L), TypeError, "loss_real: wanted a floating-point tensor, got torch"),
        (lambda: pairwise_cost(X, X, L, 0.5), TypeError, "loss_fake: wanted a torch.Tensor, got float"),
        (lambda: pairwise_cost(X, X, L, L.double()), ValueError, "loss_fake: wanted at most torch.float32, since"),
        (lambda: pairwise_cost(X, X, L, L.to("meta")), ValueError, "loss_fake: wanted the device of real, cpu, got m"),
        (lambda: pairwise_cost(X, X, L, L, margin=-1), ValueError, "margin: wanted a finite number >= 0, got -1"),
        (lambda: pairwise_cost(X, X, L, L, margin="1"), TypeError, "margin: wanted a number, got str"),
        (lambda: pairwise_cost(X, X, L, L, slope=1.5), ValueError, "slope: wanted a finite number <= 1, got 1.5"),
        (lambda: pairwise_cost(X, X, L, L, slope=math.nan), ValueError, "slope: wanted a finite number"),
        (lambda: pairwise_cost(X.to_sparse(), X, L, L), TypeError, "real: wanted a dense"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
