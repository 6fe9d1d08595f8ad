"""Spectral norm's options: several singular values, operator norms of convolutions, what is taken, bad arguments."""

import copy

import pytest
import torch
from test_spectral_modules import assert_unmoved, critic, images, largest, layers, matrix, train_step, vectors
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as legacy

import gpkernels as gp


def test_singular_values():
    model = nn.ModuleDict({name: layer for name, (layer, _) in layers().items()})
    handle = gp.spectral_norm_all(model)
    for key, found in gp.singular_values(handle, 3).items():
        module, name, dim = handle.layers[key]
        wanted = torch.linalg.svdvals(matrix(module.parametrizations[name].original, dim))[:3]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    weight = nn.Linear(200, 100)
    torch.testing.assert_close(
        gp.singular_values(weight, 4, iterations=200), torch.linalg.svdvals(weight.weight.detach())[:4]
    )


CONVOLUTIONS = {
    "same": (lambda: nn.Conv2d(2, 3, 3, padding=1), (5, 6)),
    "stride": (lambda: nn.Conv2d(2, 3, 4, 2, 1), (6, 6)),
    "groups, dilation": (lambda: nn.Conv1d(4, 6, 3, dilation=2, groups=2), (9,)),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 4, 2, 1, output_padding=1), (3, 4)),
}


def operator(module, shape):
    """A convolution as a matrix, an image at a time."""
    size = module.in_channels * torch.Size(shape).numel()
    basis = torch.eye(size, dtype=module.weight.dtype).view(size, module.in_channels, *shape)
    with torch.no_grad():
        return (module(basis) - module(torch.zeros_like(basis))).flatten(1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_norm_of_a_convolution_as_an_operator(name):
    make, shape = CONVOLUTIONS[name]
    module = make().double()
    wanted = torch.linalg.svdvals(operator(module, shape))[0]
    torch.testing.assert_close(gp.convolution_norm(module, shape, iterations=500), wanted, rtol=1e-4, atol=0)
    gp.spectral_norm(module, norm="convolution", input_shape=(module.in_channels, *shape), target=0.5)
    handle = gp.spectral_norm_handle(module)
    handle.update(500)
    torch.testing.assert_close(handle.sigmas()["weight"], wanted, rtol=1e-4, atol=0)
    assert torch.linalg.svdvals(operator(module, shape))[0].item() == pytest.approx(0.5, rel=1e-4)
    before = vectors(module)
    x = torch.randn(2, module.in_channels, *shape, dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    train_step(module, optimizer, x)
    assert any(not torch.equal(b, before[n]) for n, b in module.named_buffers())
    module.eval()
    before = vectors(module)
    train_step(module, optimizer, x)
    assert_unmoved(module, before)
    twin = copy.deepcopy(module).train()
    train_step(twin, torch.optim.SGD(twin.parameters(), 0.1), x)
    assert_unmoved(module, before)
    assert not torch.equal(next(twin.buffers()), next(module.buffers()))


def test_operator_norms_of_a_whole_model():
    model, x = critic(), images()
    handle = gp.spectral_norm_all(model, norm="convolution", sample=x)
    handle.update(300)
    assert model.training
    for i, size in ((0, 16), (2, 8)):
        assert gp.convolution_norm(model[i], (size, size)).item() == pytest.approx(1, rel=1e-3)
    assert largest(model[5].weight) == pytest.approx(1, rel=1e-3)
    train_step(model, torch.optim.Adam(model.parameters()), x)
    gp.gradient_penalty(model, x, kind="r1").backward()


def test_what_spectral_norm_all_takes():
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(3, 3)),
        legacy(nn.Linear(3, 3)),
        gp.spectral_norm(nn.Linear(3, 3)),
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)),
        nn.Linear(3, 3),
    )
    handle = gp.spectral_norm_all(model, select=lambda name, module: name != "4")
    assert list(handle) == ["3.1.weight"]
    assert list(gp.spectral_norm_handle(model)) == ["2.weight", "3.1.weight"]
    vector = gp.spectral_norm(nn.LayerNorm(5), target=2.0)
    assert vector.weight.norm().item() == pytest.approx(2)
    assert list(vector.state_dict()) == ["bias", "parametrizations.weight.original"]


WRONG = {
    "module": (lambda: gp.spectral_norm(torch.ones(2)), TypeError, "module: wanted a torch.nn.Module"),
    "name": (lambda: gp.spectral_norm(nn.Linear(2, 2), "wait"), ValueError, "name: wanted a parameter or buffer"),
    "no bias": (lambda: gp.spectral_norm(nn.Linear(2, 2, bias=False), "bias"), ValueError, "name: wanted a parameter"),
    "iterations": (lambda: gp.spectral_norm(nn.Linear(2, 2), n_power_iterations=0), ValueError, "n_power_iterations"),
    "eps": (lambda: gp.spectral_norm(nn.Linear(2, 2), eps=-1), ValueError, "eps: wanted a finite number >= 0"),
    "dim": (lambda: gp.spectral_norm(nn.Linear(2, 2), dim=2), ValueError, "dim: wanted a dimension of the weight"),
    "target": (lambda: gp.spectral_norm(nn.Linear(2, 2), target=0), ValueError, "target: wanted a number > 0"),
    "update": (lambda: gp.spectral_norm_all(critic(), update="never"), ValueError, "update: wanted one of"),
    "init": (lambda: gp.spectral_norm_all(critic(), init="zeros"), ValueError, "init: wanted one of"),
    "norm": (lambda: gp.spectral_norm_all(critic(), norm="l2"), ValueError, "norm: wanted one of"),
    "sample": (lambda: gp.spectral_norm_all(critic(), norm="convolution"), TypeError, "sample: wanted an input"),
    "twice": (lambda: gp.spectral_norm(gp.spectral_norm(nn.Linear(2, 2))), ValueError, "not spectrally normalised yet"),
    "none": (lambda: gp.spectral_norm_all(nn.ReLU()), ValueError, "model: wanted a model with a layer"),
    "lazy": (lambda: gp.spectral_norm_all(nn.LazyLinear(2)), ValueError, "an initialised weight"),
    "complex": (
        lambda: gp.spectral_norm(nn.Linear(2, 2, dtype=torch.complex64)),
        TypeError,
        "wanted a floating-point tensor",
    ),
    "shape": (
        lambda: gp.spectral_norm(nn.Conv2d(3, 2, 1), norm="convolution", input_shape=(4, 8, 8)),
        ValueError,
        "input_shape: wanted",
    ),
    "behind another": (
        lambda: gp.spectral_norm(parametrizations.weight_norm(nn.Linear(2, 2))),
        ValueError,
        "update: wanted 'read' for a weight with other parametrizations",
    ),
    "u": (
        lambda: gp.spectral_normalize(torch.ones(2, 3), torch.ones(3), torch.ones(3)),
        ValueError,
        "u: wanted a contiguous constant",
    ),
    "k": (lambda: gp.singular_values(nn.Linear(2, 3), 3), ValueError, "k: wanted at most 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()


def test_behind_another_parametrization():
    module = gp.spectral_norm(parametrizations.weight_norm(nn.Linear(6, 4)), update="read")
    for _ in range(60):
        module(torch.randn(2, 6))
    assert largest(module.weight) == pytest.approx(1, rel=1e-3)
    inner = parametrize.register_parametrization(gp.spectral_norm(nn.Linear(6, 4)), "weight", nn.Identity())
    assert largest(inner.weight) == pytest.approx(1, rel=1e-2)
