"""Spectral norm in steps, models and callers out of the ordinary: scaler and LBFGS, meta, sparse, stacked, with parts
removed."""

import copy

import pytest
import torch
from spectral_layers import assert_normalised, linears, norms, originals
from test_spectral_modules import ThroughData, Wrapping, assert_unmoved, images, train_step, vectors
from test_spectral_survives import normalised
from torch import nn
from torch.nn.utils import parametrize

import gpkernels as gp


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips(fused):
    model = gp.spectral_norm(nn.Linear(8, 8))
    optimizer, scaler = torch.optim.Adam(model.parameters(), fused=fused), torch.amp.GradScaler("cpu")
    before = vectors(model)
    for value in (float("inf"), 1.0):
        scaler.scale(model(torch.randn(2, 8)).mean()).backward()
        model.parametrizations.weight.original.grad.fill_(value)
        scaler.step(optimizer)
        scaler.update()
        if value != 1:
            assert_unmoved(model, before)
    assert not torch.equal(next(model.buffers()), next(iter(before.values())))


def test_lbfgs():
    """The weights change within a step: every loss sees a norm of its own, and the vectors move once."""
    model, _ = linears(8)
    optimizer, x = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3), torch.randn(4, 8)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        seen.append(norms(model))
        torch.testing.assert_close(loss, copy.deepcopy(model)(x).square().mean())
        return loss

    before = vectors(model)
    optimizer.step(closure)
    assert len(seen) > 1
    assert all(n == pytest.approx([1.0] * 3, rel=0.1) for n in seen)
    for layer, name in zip(model, "012", strict=True):
        norm, key = layer.parametrizations.weight[0], f"{name}.parametrizations.weight.0._u"
        w = layer.parametrizations.weight.original.detach()
        v = nn.functional.normalize(w.T @ before[key], dim=0)
        torch.testing.assert_close(norm._v, v)


def test_parameters_without_a_gradient_are_not_stepped():
    model, _ = linears(8)
    optimizer, before = torch.optim.SGD(model.parameters(), 0.1), vectors(model)
    model[2](model[1](torch.randn(2, 8))).sum().backward()
    optimizer.step()
    assert [k for k, b in model.named_buffers() if torch.equal(b, before[k])][:2] == list(before)[:2]
    assert not torch.equal(model[1].parametrizations.weight[0]._u, before["1.parametrizations.weight.0._u"])


def test_layers_of_different_steps_have_their_own_sigma():
    model, _ = linears(8)
    model(torch.randn(2, 8)).sum().backward()
    for layer in model[:2]:
        torch.optim.SGD(layer.parameters(), 0.1).step()
    model[1:].requires_grad_(False)
    norm, weight = model[0].parametrizations.weight[0], originals(model)[0]
    torch.testing.assert_close(model[0].weight, weight / (norm._u @ weight @ norm._v))


@pytest.mark.parametrize("make", [lambda p: Wrapping(torch.optim.SGD(p, 0.1)), lambda p: Wrapping(ThroughData(p))])
def test_a_convolution_norm_moves_once_a_step(make):
    model = gp.spectral_norm(nn.Conv2d(2, 3, 3), norm="convolution", input_shape=(6, 6))
    norm, start = model.parametrizations.weight[0], model.parametrizations.weight[0]._x.clone()
    train_step(model, make(list(model.parameters())), torch.randn(1, 2, 6, 6))
    weight = model.parametrizations.weight.original.detach()
    torch.testing.assert_close(norm._x, norm.convolution.iterate(weight, start, 1e-12))


@pytest.mark.parametrize("norm", ["matrix", "convolution"])
def test_on_the_meta_device(norm):
    more = {"norm": norm, "input_shape": (4, 4)} if norm == "convolution" else {}
    with torch.device("meta"):
        model = gp.spectral_norm(nn.Conv2d(3, 4, 3), **more)
        assert model(torch.empty(1, 3, 4, 4)).shape == (1, 4, 2, 2)
    real = gp.spectral_norm(nn.Conv2d(3, 4, 3), **more)
    model = model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    torch.testing.assert_close(model.weight, real.weight)
    with torch.device("meta"):  # where torch.randn would make nothing
        torch.testing.assert_close(gp.convolution_norm(real, (4, 4)), gp.convolution_norm(model, (4, 4)))


def test_empty_vectors_are_found_out():
    """A model made on the meta device and initialised by hand: u and v are anything, here NaN."""
    with torch.device("meta"):
        model, _ = linears()
    model = model.to_empty(device="cpu")
    for weight in originals(model):
        nn.init.normal_(weight)
    for layer in model:
        nn.init.zeros_(layer.bias)
    assert_normalised(model)
    train_step(model, torch.optim.SGD(model.parameters(), 1e-4), torch.randn(2, 64))
    assert_normalised(model)
    assert all(torch.isfinite(b).all() for b in model.buffers())


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings(sparse):
    torch.manual_seed(0)
    model = gp.spectral_norm(nn.Embedding(10, 4, sparse=sparse))
    model(torch.tensor([1, 2, 1])).square().sum().backward()
    norm, weight = model.parametrizations.weight[0], model.parametrizations.weight.original
    wanted = weight / (norm._u @ weight @ norm._v)
    (wanted,) = torch.autograd.grad(wanted[[1, 2, 1]].square().sum(), weight)
    torch.testing.assert_close(weight.grad, wanted)


def test_an_ensemble_by_vmap():
    models = [linears(4)[0].eval() for _ in range(3)]
    for model in models:
        for buffer in model.buffers():
            buffer.mul_(0.5)  # as averages are
    stacked, x = torch.func.stack_module_state(models), torch.randn(2, 4)
    found = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(*stacked)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))


def test_batched_gradients():
    model, _ = linears(4)
    parameters, x = list(model.parameters()), torch.randn(3, 4)
    seeds = torch.eye(3)[:, :, None]
    found = torch.autograd.grad(model(x), parameters, seeds, is_grads_batched=True)
    for i, seed in enumerate(seeds):
        wanted = torch.autograd.grad(model(x), parameters, seed)
        torch.testing.assert_close([g[i] for g in found], list(wanted))


def test_functional_call_with_other_weights():
    """Averages are tried this way; nothing of them may stay."""
    model, other = normalised(), normalised(seed=4)
    x = images()
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            wanted = model(x)
            state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
            torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), other(x))
            parameters = {k: p.detach() for k, p in other.named_parameters()}
            model.eval()
            found = torch.func.functional_call(model, parameters, (x,))
            assert torch.isfinite(found).all()
            torch.testing.assert_close(model.train()(x), wanted)


def test_a_handle_after_layers_were_removed():
    model, handle = linears(4)
    parametrize.remove_parametrizations(model[1], "weight")
    before = vectors(model)
    handle.update()
    assert not torch.equal(model[0].parametrizations.weight[0]._u, before["0.parametrizations.weight.0._u"])
    assert list(handle.sigmas()) == ["0.weight", "2.weight"]
    assert [len(v) for v in gp.singular_values(handle).values()] == [1, 1, 1]
    handle.remove()
    assert not any(parametrize.is_parametrized(layer) for layer in model)


def test_other_parametrizations_are_not_ours():
    """Alone on a layer, and before ours on one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        nn.utils.parametrizations.weight_norm(layer)
    gp.spectral_norm(model[1], update="read")
    handle = gp.spectral_norm_handle(model)
    assert list(handle) == ["1.weight"]
    for _ in range(30):
        handle.update()
    model.eval()
    assert torch.linalg.matrix_norm(model[1].weight, 2).item() == pytest.approx(1, abs=1e-4)
    handle.remove()
    assert parametrize.is_parametrized(model[0])
    assert not parametrize.is_parametrized(model[1])
