"""spectral_norm's autograd Functions: derivatives of every order, changes between the passes, who gets a gradient."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from gpkernels.ops.spectral_norm.autograd import spectral_iterate, spectral_scale

EPS = 1e-12
LAYERS = [((5, 3, 2, 2), 1), ((3, 4), 0), ((7,), 0), ((2, 3, 2), 2)]
TARGETS = [1.0, 2.0, 0.5, 1.5]


def unit(n):
    return F.normalize(torch.randn(n, dtype=torch.float64), dim=0)


def group(device, layers=LAYERS):
    """(weights, u, v, dims), after an iteration."""
    weights = [torch.randn(shape, dtype=torch.float64, device=device) for shape, _ in layers]
    dims = [dim for _, dim in layers]
    u = [unit(w.shape[dim]).to(device) for w, dim in zip(weights, dims, strict=True)]
    v = [unit(w.numel() // w.shape[dim]).to(device) for w, dim in zip(weights, dims, strict=True)]
    spectral_iterate(weights, u, v, dims, 1, EPS)
    return [w.requires_grad_() for w in weights], u, v, dims


def scaled(weights, u, v, dims, targets=None):
    targets = targets or TARGETS[: len(weights)]
    return spectral_scale(weights, u, v, spectral_iterate(weights, u, v, dims, 0, EPS), dims, targets, EPS)


def plain(weights, u, v, dims):
    """The same as anybody would write it."""
    results = []
    for w, left, right, dim, target in zip(weights, u, v, dims, TARGETS, strict=False):
        others = [d for d in range(w.dim()) if d != dim]
        results.append(target * w / (left @ w.permute(dim, *others).reshape(len(left), -1) @ right))
    return results


def test_first_and_second_derivative(backend, device):
    weights, u, v, dims = group(device)
    assert gradcheck(lambda *w: tuple(scaled(w, u, v, dims)), weights)
    assert gradgradcheck(lambda *w: tuple(scaled(w, u, v, dims)), weights)


def test_derivatives_with_vectors_that_are_not_singular(backend, device):
    """sigma is u . (W v) for any u and v."""
    weights, u, v, dims = group(device)
    for x in (*u, *v):
        x.copy_(torch.randn_like(x) + 1)
    assert gradgradcheck(lambda *w: tuple(x for x in scaled(w, u, v, dims)), weights)


def test_third_derivative(backend, device):
    weights, u, v, dims = group(device, LAYERS[:2])

    def first(*w):
        total = sum((x**3).sum() for x in scaled(w, u, v, dims))
        return torch.autograd.grad(total, w, create_graph=True)

    assert gradgradcheck(first, weights)


def test_every_order_equals_plain_torch(backend, device):
    """Mixed with other uses of the weights, through tensors that are no leaves."""
    weights, u, v, dims = group(device)
    results = []
    for f in (scaled, plain):
        inner = [w.sin() for w in weights]
        total = sum((x.exp() * w).sum() for x, w in zip(f(inner, u, v, dims), inner, strict=True))
        first = torch.autograd.grad(total, weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), weights, create_graph=True)
        third = torch.autograd.grad(sum(g.sin().sum() for g in second), weights)
        results.append([*first, *second, *third])
    torch.testing.assert_close(*results)


def test_derivatives_of_a_dead_layer(backend, device):
    """Where sigma is at most eps the op is target W, alive neighbours not disturbed."""
    weights, u, v, dims = group(device)
    with torch.no_grad():
        weights[1].zero_()
    out = scaled(weights, u, v, dims)
    grads = [torch.randn_like(w, requires_grad=True) for w in weights]
    first = torch.autograd.grad(out, weights, grads, create_graph=True)
    assert torch.equal(first[1], 2.0 * grads[1])
    tangents = [torch.randn_like(w) for w in weights]
    second = torch.autograd.grad(first, [*grads, *weights], tangents)
    torch.testing.assert_close(second[1], 2.0 * tangents[1])
    assert torch.equal(second[5], torch.zeros_like(weights[1]))
    alive = [0, 2, 3]
    wanted = plain([weights[i] for i in alive], [u[i] for i in alive], [v[i] for i in alive], [dims[i] for i in alive])
    wanted = torch.autograd.grad(
        [w * TARGETS[i] / t for w, i, t in zip(wanted, alive, TARGETS, strict=False)],
        [weights[i] for i in alive],
        [grads[i] for i in alive],
    )
    torch.testing.assert_close([first[i] for i in alive], list(wanted))


def test_constants_and_unused_layers_get_none(backend, device):
    weights, u, v, dims = group(device)
    weights[2].requires_grad_(False)
    out = scaled(weights, u, v, dims)
    (out[0].sum() + out[2].sum()).backward()
    assert [w.grad is None for w in weights] == [False, True, True, True]
    torch.testing.assert_close(weights[0].grad, torch.autograd.grad(plain(weights, u, v, dims)[0].sum(), weights[0])[0])
    assert torch.equal(out[2], scaled(weights, u, v, dims)[2])


def test_only_some_weights_in_the_second_derivative(backend, device):
    weights, u, v, dims = group(device)
    results = []
    for f in (scaled, plain):
        out = f(weights, u, v, dims)
        first = torch.autograd.grad(out[1].exp().sum(), weights[1], create_graph=True)[0]
        results.append(torch.autograd.grad(first.square().sum(), weights[1]))
    torch.testing.assert_close(*results)


def test_no_graph_without_gradients(backend, device):
    weights, u, v, dims = group(device)
    with torch.no_grad():
        assert not any(x.requires_grad for x in scaled(weights, u, v, dims))
    with torch.inference_mode():
        inside = [w.clone() for w in weights]
        torch.testing.assert_close(scaled(inside, u, v, dims), scaled(weights, u, v, dims))


def test_two_backwards_share_the_normalised_weights(backend, device):
    """loss_real.backward(); loss_fake.backward()"""
    weights, u, v, dims = group(device)
    out = scaled(weights, u, v, dims)
    sum(x.square().sum() for x in out).backward()
    sum(x.exp().sum() for x in out).backward()
    wanted = plain(weights, u, v, dims)
    wanted = torch.autograd.grad(sum((x.square() + x.exp()).sum() for x in wanted), weights)
    torch.testing.assert_close([w.grad for w in weights], list(wanted))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weight", r"the weight of layer 1, of shape \(3, 4\), was changed in place"),
        ("sigma", "sigma was changed in place"),
    ],
)
def test_changes_between_the_passes_raise(backend, device, what, message):
    weights, u, v, dims = group(device)
    sigma = spectral_iterate(weights, u, v, dims, 0, EPS)
    out = spectral_scale(weights, u, v, sigma, dims, TARGETS, EPS)
    tangents = [torch.randn_like(w) for w in weights]
    first = torch.autograd.grad(out, weights, [x.square().detach() for x in out], create_graph=True, retain_graph=True)
    with torch.no_grad():
        {"weight": weights, "sigma": sigma * 2}[what][1].mul_(1.0)
    with pytest.raises(RuntimeError, match=message):
        sum(x.sum() for x in out).backward()
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(first, weights, tangents)


def test_an_iteration_between_the_passes_changes_nothing(backend, device):
    """The gradient is that of u and v at the time of the forward, also where only some layers have one."""
    weights, u, v, dims = group(device)
    before = [x.clone() for x in u], [x.clone() for x in v]
    out, wanted = scaled(weights, u, v, dims), plain(weights, *before, dims)
    spectral_iterate(weights, u, v, dims, 1, EPS)
    for layers in (range(len(weights)), [1], [2, 0]):
        some = [weights[i] for i in layers]
        got, right = (
            torch.autograd.grad(sum(x[i].exp().sum() for i in layers), some, retain_graph=True) for x in (out, wanted)
        )
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2, 1:],
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
    ids=["channels_last", "transposed", "sliced", "expanded"],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_strided_weights(backend, device, view, dim):
    (weight,), (u,), (v,), dims = group(device, [((4, 6, 3, 5), dim)])
    weight = view(weight.detach())
    u, v = unit(weight.shape[dim]).to(device), unit(weight.numel() // weight.shape[dim]).to(device)
    spectral_iterate([weight], [u], [v], dims, 1, EPS)  # from here on sigma > 0
    weight = weight.requires_grad_()
    results = []
    for f in (scaled, plain):
        (out,) = f([weight], [u], [v], dims)
        (first,) = torch.autograd.grad(out.exp().sum(), weight, create_graph=True)
        results.append([out, first, *torch.autograd.grad(first.square().sum(), weight)])
    torch.testing.assert_close(*results)
    if weight.is_contiguous(memory_format=torch.channels_last):
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in results[0][:2])


def test_low_precision_weights(backend, device):
    """Gradients in the weight's dtype, computed in float32."""
    weight = torch.randn(20, 30, device=device).bfloat16().requires_grad_()
    u, v = unit(20).float().to(device), unit(30).float().to(device)
    spectral_iterate([weight], [u], [v], [0], 3, EPS)
    results = []
    for x in (weight, weight.detach().double().requires_grad_()):
        left, right = (y.double() if x.dtype == torch.float64 else y for y in (u, v))
        (out,) = scaled([x], [left], [right], [0])
        (first,) = torch.autograd.grad(out, x, torch.ones_like(out) + out.detach(), create_graph=True)
        (second,) = torch.autograd.grad(first, x, torch.ones_like(first))
        results.append((out, first, second))
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).norm() < 1e-2 * wanted.norm()


def test_the_graph_dies_with_its_last_user(backend, device):
    weights, u, v, dims = group(device)
    out = scaled(weights, u, v, dims)
    node = weakref.ref(out[0].grad_fn)
    first = torch.autograd.grad(out[0].sum(), weights[0], create_graph=True)
    del out, first
    gc.collect()
    assert node() is None


def test_torch_func_sees_through():
    (weight,), (u,), (v,), dims = group("cpu", LAYERS[1:2])
    results = []
    for f in (lambda w: scaled([w], [u], [v], dims, [1.0])[0], lambda w: plain([w], [u], [v], dims)[0]):
        results.append(torch.func.hessian(lambda w, f=f: f(w).exp().sum())(weight.detach()))
    torch.testing.assert_close(*results)


def test_compiles_fullgraph():
    """Iteration, normalised weights and their gradient, without a graph break; u and v move as they do in eager."""
    weights, u, v, dims = group("cpu")

    def step(weights, u, v):
        sigma = spectral_iterate(weights, u, v, dims, 1, EPS)
        return sum(x.exp().sum() for x in spectral_scale(weights, u, v, sigma, dims, TARGETS, EPS))

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        left, right = [x.clone() for x in u], [x.clone() for x in v]
        value = f(weights, left, right)
        results.append([value, *torch.autograd.grad(value, weights), *left, *right])
    torch.testing.assert_close(*results)
