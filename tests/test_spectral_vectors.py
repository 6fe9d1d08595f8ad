"""u and v: directions, misfits, dtypes, and the weights that try them."""

import copy
import weakref

import pytest
import torch
from spectral_layers import linears
from test_spectral_modules import assert_unmoved, images, largest, train_step, vectors
from test_spectral_survives import normalised
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gpkernels as gp
from gpkernels.ops.spectral_norm.autograd import spectral_iterate
from gpkernels.spectral.vectors import misfits, units


def test_a_group_forgets_layers():
    model, _ = linears(4)
    group = model[0].parametrizations.weight[0].group
    reference = weakref.ref(model[1].parametrizations.weight[0])
    parametrize.remove_parametrizations(model[1], "weight")
    assert reference() is None
    assert len(group.watched()) == len(group._members) == 2


def test_registered_in_evaluation():
    model = gp.spectral_norm(nn.Linear(4, 4).eval())
    before = vectors(model)
    train_step(model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(2, 4))
    assert_unmoved(model, before)


def test_vectors_of_any_length_are_directions():
    model = normalised()
    handle, x = gp.spectral_norm_handle(model), images()
    wanted, sigmas = model(x), handle.sigmas()
    compiled = copy.deepcopy(model)
    for net in (model, compiled):
        for buffer in net.buffers():
            buffer.mul_(0.25)
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(handle.sigmas(), sigmas)
    for layer in (compiled[0], compiled[2], compiled[5]):
        layer.parametrizations.weight[0]._u.neg_()
    traced = torch.jit.trace(compiled, x, check_trace=False)
    torch.testing.assert_close(traced(x), wanted)


def test_misfits():
    """u off the direction of W v, though sigma is not small; v off that of W^T u, of one row; neither; NaN."""
    one, half, thin = torch.eye(2)[0], torch.full((2,), 0.5**0.5), torch.tensor([0.3, 0.91**0.5])
    weights = [torch.eye(2), torch.eye(2)[:1], torch.eye(2), torch.zeros(2, 2), torch.eye(2)]
    u = [half, torch.ones(1), half, half, torch.full((2,), torch.nan)]
    v = [one, thin, half, half, half]
    dims = [0] * len(weights)
    sigmas = spectral_iterate(weights, u, v, dims, 0, 1e-12)
    before = [x.clone() for x in (*u, *v)]
    assert misfits(weights, u, v, dims, 1e-12, sigmas) == [0, 1, 4]
    assert all(torch.equal(a, b) for a, b in zip([*u[:4], *v], [*before[:4], *before[5:]], strict=True))


def test_sigmas_of_every_read_mode():
    module = gp.spectral_norm(nn.Linear(4, 4), update="read")
    handle = gp.spectral_norm_handle(module)
    wanted = handle.sigmas()
    for buffer in module.buffers():
        buffer.mul_(0.25)
    module.parametrizations.weight[0]._u.neg_()
    torch.testing.assert_close(handle.sigmas(), wanted)


def test_units():
    unit, zero = nn.functional.normalize(torch.randn(7), dim=0), torch.zeros(3)
    for group in ([unit], [zero], [unit, zero], [unit, zero.double()]):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(units(group), group, strict=True))
    for group in ([3 * unit], [3 * unit, 0.1 * unit]):
        torch.testing.assert_close(units(group), [unit] * len(group))


def test_halves_keep_the_vectors_bits():
    model = normalised()
    before = vectors(model)
    assert_unmoved(model.to(torch.bfloat16), before)
    assert model[0].parametrizations.weight[0].known.held is None, "the float32 weights are let go"


@pytest.mark.parametrize("norm", ["matrix", "convolution"])
def test_a_weight_of_another_dtype(norm):
    more = {"norm": norm, "input_shape": (4, 4)} if norm == "convolution" else {}
    model = gp.spectral_norm(nn.Conv2d(2, 3, 3), **more)
    gp.spectral_norm_handle(model).update()
    for p in model.parameters():
        p.data = p.data.double()
    train_step(model, torch.optim.SGD(model.parameters(), 0.1), torch.randn(1, 2, 4, 4).double())
    assert {b.dtype for b in model.buffers()} == {torch.float64}


def test_behind_another_parametrization_a_weight_is_not_the_original():
    module = nn.Linear(6, 6)
    parametrize.register_parametrization(module, "weight", nn.ReLU(), unsafe=True)
    gp.spectral_norm(module, update="read")
    before = vectors(module)
    module.load_state_dict({"parametrizations.weight.original": torch.randn(6, 6)}, strict=False)
    assert_unmoved(module, before)
    gp.spectral_norm_handle(module).update(300)
    sigma = gp.spectral_norm_handle(module).sigmas()["weight"].item()
    assert sigma == pytest.approx(largest(module.parametrizations.weight.original.relu()), rel=1e-4)
    assert gp.singular_values(module).item() == pytest.approx(sigma, rel=1e-4)


def test_singular_values_of_other_parametrizations():
    plain = nn.Linear(5, 4)
    wanted = torch.linalg.svdvals(plain.weight.detach())[:2]
    for wrap in (parametrizations.weight_norm, nn.utils.spectral_norm, parametrizations.spectral_norm):
        module = wrap(copy.deepcopy(plain))
        torch.testing.assert_close(gp.singular_values(module, 2), wanted)


def test_singular_values_close_together():
    wanted = 1 - 0.02 * torch.arange(40)
    module = nn.Linear(40, 40)
    left, right = (torch.linalg.qr(torch.randn(40, 40)).Q for _ in range(2))
    module.weight.data = left @ wanted.diag() @ right
    torch.testing.assert_close(gp.singular_values(module, 3), wanted[:3], rtol=1e-4, atol=0)


def test_convolution_norms_of_weights_that_vanish_or_nearly():
    for scale in (1e-6, 1e-8, 0.0):
        module = nn.Conv2d(4, 4, 3, padding=1)
        module.weight.data.mul_(scale)
        gp.spectral_norm(module, norm="convolution", input_shape=(6, 6))
        gp.spectral_norm_handle(module).update(100)
        if scale:
            assert gp.convolution_norm(module, (6, 6)).item() == pytest.approx(1, rel=1e-3)
        else:
            assert not module.weight.any()
            module(torch.randn(1, 4, 6, 6)).sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in module.parameters())
        assert torch.isfinite(module.parametrizations.weight[0]._x).all()


def test_convolution_norms_take_x_as_a_direction_and_inference_mode():
    module = gp.spectral_norm(nn.Conv2d(3, 3, 3), norm="convolution", input_shape=(6, 6))
    handle = gp.spectral_norm_handle(module)
    wanted = handle.sigmas()["weight"]
    module.parametrizations.weight[0]._x.mul_(3)
    torch.testing.assert_close(handle.sigmas()["weight"], wanted)
    with torch.inference_mode():
        handle.update()
        torch.testing.assert_close(gp.convolution_norm(module, (6, 6)).item(), 1.0, rtol=0.06, atol=0)


class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.kind = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), kind

    def forward(self, x):
        if self.kind == "two sizes":
            return self.b(self.a(self.a(x)[:, :, ::4, ::4]))
        return self.a(x) if self.kind == "unreached" else self.b(self.a(input=x))


def test_samples_of_convolutions():
    x = torch.randn(1, 3, 8, 8)
    for kind, message in (("unreached", "none in b"), ("two sizes", r"\(3, 8, 8\) and \(3, 2, 2\) for a")):
        with pytest.raises(ValueError, match=message):
            gp.spectral_norm_all(Odd(kind), norm="convolution", sample=x)
    for sample in (x, x[0]):
        net = Odd("keyword")
        gp.spectral_norm_all(net, norm="convolution", sample=sample)
        assert net.a.parametrizations.weight[0].convolution.shape == (3, 8, 8)


def test_vectors_as_weights():
    for scale in (1.0, 1e20, 1e-20, 0.0):
        module = nn.LayerNorm(5)
        module.weight.data.copy_(torch.randn(5) * scale)
        gp.spectral_norm(module, eps=1e-30)
        wanted = nn.functional.normalize(module.parametrizations.weight.original.double(), dim=0, eps=1e-30)
        torch.testing.assert_close(module.weight.double(), wanted, rtol=1e-5, atol=1e-7)
        module.weight.sum().backward()
        assert torch.isfinite(module.parametrizations.weight.original.grad).all()


def test_calls_of_spectral_normalize_share_vectors():
    """Each has the gradient of its own u and v, whatever later calls do to them."""
    w = torch.randn(4, 3, requires_grad=True)
    u, v = torch.eye(4)[0].clone(), torch.eye(3)[0].clone()
    first = gp.spectral_normalize(w, u, v)
    then = u.clone(), v.clone()
    second = gp.spectral_normalize(w, u, v)
    assert not torch.equal(u, then[0])
    (found,) = torch.autograd.grad(first.sum() + second.sum(), w)
    wanted = sum((w / (a @ w @ b)).sum() for a, b in (then, (u, v)))
    torch.testing.assert_close(found, torch.autograd.grad(wanted, w)[0])


@pytest.mark.parametrize("autograd_mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_are_not_dense(autograd_mode):
    w, (u, v) = torch.randn(6, 4, 8, requires_grad=True), (torch.ones(6) / 6**0.5, torch.ones(16) / 4)
    part, others = w[:, :, ::2], (u.clone(), v.clone())
    found, wanted = gp.spectral_normalize(part, u, v), gp.spectral_normalize(part.contiguous(), *others)
    torch.testing.assert_close((found, u, v), (wanted, *others))
    for result in torch.autograd.grad(found.square().sum() - wanted.square().sum(), w):
        torch.testing.assert_close(result, torch.zeros_like(result), atol=1e-5, rtol=0)
    with autograd_mode():
        torch.testing.assert_close(gp.spectral_normalize(part, u, v, n_power_iterations=0), found)


def test_words_for_odd_weights():
    for call, message in (
        (lambda: gp.spectral_norm(nn.Embedding(0, 4)), "module.weight: wanted at least one dimension and one element"),
        (lambda: gp.spectral_normalize(torch.ones(2, 0), None, None), r"weight: .* one element, got shape \(2, 0\)"),
        (lambda: gp.spectral_normalize(torch.ones(2, 2), None, None, target=0), "target: wanted a number > 0"),
        (lambda: gp.spectral_normalize(torch.ones(2, 2), None, None, n_power_iterations=-1), ">= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
