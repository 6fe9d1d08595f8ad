"""Spectral norm of modules: against svd and torch's own, one sigma a step, pure reads, options, bad arguments, and the
defects of public code. tests/test_spectral_survives.py has what happens to a model around it."""

import copy

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as legacy

import gpkernels as gp


def layers():
    """One of every kind that spectral_norm_all takes, with the shape of an input."""
    return {
        "conv1d": (nn.Conv1d(3, 5, 3), (2, 3, 9)),
        "conv2d": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8)),
        "conv3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
        "transposed": (nn.ConvTranspose2d(3, 7, 3, 2, 1), (2, 3, 5, 5)),
        "linear": (nn.Linear(9, 4), (2, 9)),
        "bilinear": (nn.Bilinear(3, 4, 5), None),
        "embedding": (nn.Embedding(11, 6), None),
        "one output": (nn.Linear(8, 1), (3, 8)),
    }


def critic(width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 1),
    )


def images(batch=4):
    return torch.randn(batch, 3, 16, 16)


def matrix(weight, dim=0):
    return weight.detach().movedim(dim, 0).flatten(1)


def largest(weight, dim=0):
    return torch.linalg.svdvals(matrix(weight, dim).double())[0].item()


def vectors(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def assert_unmoved(model, before):
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("target", [1.0, 2.5])
@pytest.mark.parametrize("init", ["power", "svd"])
def test_every_layer_has_the_target_norm(target, init):
    model = nn.ModuleDict({name: layer for name, (layer, _) in layers().items()})
    handle = gp.spectral_norm_all(model, target=target, init=init)
    assert len(handle) == len(layers())
    handle.update(300)
    for key, (module, name, dim) in handle.layers.items():
        weight = getattr(module, name)
        assert dim == (1 if "transposed" in key else 0)
        assert largest(weight, dim) == pytest.approx(target, rel=1e-4)
        original = module.parametrizations[name].original
        sigma = handle.sigmas()[key]
        assert sigma.item() == pytest.approx(largest(original, dim), rel=1e-4)
        torch.testing.assert_close(weight, target * original / sigma)


def test_the_start():
    exact = gp.spectral_norm(nn.Conv2d(8, 16, 3), init="svd")
    assert largest(exact.weight) == pytest.approx(1, rel=1e-5)
    made = []
    for make in (parametrizations.spectral_norm, lambda m: gp.spectral_norm(m, update="read")):
        torch.manual_seed(3)
        made.append(make(nn.Conv2d(8, 16, 3)))
    for a, b in zip(*(module.buffers() for module in made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert largest(gp.spectral_norm(nn.Conv2d(8, 16, 3)).weight) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("kind", ["conv2d", "transposed", "linear"])
@pytest.mark.parametrize("count", [1, 3])
def test_every_read_mode_is_torchs(kind, count):
    """The same numbers, from the same u and v, through training and evaluation, with the same gradients."""
    layer, shape = layers()[kind]
    torchs = parametrizations.spectral_norm(copy.deepcopy(layer), n_power_iterations=count)
    ours = gp.spectral_norm(layer, n_power_iterations=count, update="read")
    ours.load_state_dict(torchs.state_dict(), strict=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (ours, torchs)]
    for step in range(6):
        x = torch.randn(shape)
        for module, optimizer in zip((ours, torchs), optimizers, strict=True):
            module.train(step != 3)
            optimizer.zero_grad()
            with torch.no_grad():
                module(x)
            (module(x).square().mean() - module(-x).sin().mean()).backward()
            optimizer.step()
        for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        for a, b in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_moves_u_and_v_once_and_only_of_what_it_changed():
    model = critic()
    handle = gp.spectral_norm_all(model)
    half = torch.optim.SGD(model[0].parameters(), 0.1)
    elsewhere = torch.optim.SGD([nn.Parameter(torch.ones(1, requires_grad=True))], 0.1)
    before = vectors(model)
    model(images()).mean().backward()
    elsewhere.step()
    assert_unmoved(model, before)
    half.step()
    moved = [name for name, b in model.named_buffers() if not torch.equal(b, before[name])]
    assert moved == ["0.parametrizations.weight.0._u", "0.parametrizations.weight.0._v"]
    w = matrix(model[0].parametrizations.weight.original)
    v = F.normalize(w.T @ before["0.parametrizations.weight.0._u"], dim=0)
    torch.testing.assert_close(model[0].parametrizations.weight[0]._v, v)
    torch.testing.assert_close(model[0].parametrizations.weight[0]._u, F.normalize(w @ v, dim=0))
    torch.testing.assert_close(handle.sigmas()["0.weight"], (w @ v).norm())


class ThroughData(torch.optim.Optimizer):
    """Writes through .data, so that no version moves."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad.data, alpha=0.1)


class Wrapping(torch.optim.Optimizer):
    """An optimizer whose step is that of another."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self):
        self.inner.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "fused adam": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "foreach adam": lambda p: torch.optim.Adam(p, 0.1, foreach=True),
    "through .data": ThroughData,
    "wrapping": lambda p: Wrapping(torch.optim.SGD(p, 0.1)),
    "wrapping .data": lambda p: Wrapping(ThroughData(p)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_is_noticed_once_a_step(name):
    model = critic()
    twin = copy.deepcopy(model)
    gp.spectral_norm_all(model)
    by_hand = gp.spectral_norm_all(twin)
    twin.load_state_dict(model.state_dict())
    twin.eval()  # no hook moves it
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for _ in range(3):
        train_step(model, optimizer, images())
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.copy_(p)
        by_hand.update()
        assert_unmoved(model, vectors(twin))
        x = images()
        torch.testing.assert_close(model(x), twin(x))


def test_reading_is_pure():
    """Defect: reading the weight iterating u; in training mode, under no_grad, in evaluation, after a load."""
    model = critic()
    gp.spectral_norm_all(model)
    states = [lambda: model.train(), lambda: model.eval(), lambda: model.load_state_dict(model.state_dict())]
    for change in states:
        change()
        before, x = vectors(model), images()
        with torch.no_grad():
            first = model(x)
        torch.testing.assert_close(model(x), first)
        str(model[0].weight)
        with torch.no_grad(), torch.inference_mode():
            torch.testing.assert_close(model(x), first)
        assert_unmoved(model, before)


def test_one_sigma_in_a_step():
    """Defect: three sigma in one D step (real, fake, interpolate)."""
    model = critic()
    handle = gp.spectral_norm_all(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []
    model[2].register_forward_hook(lambda *unused: seen.append(model[2].weight))
    for _ in range(3):
        optimizer.zero_grad()
        real, fake = images(), images()
        penalty = gp.gradient_penalty(model, real, fake)
        (model(fake).mean() - model(real).mean() + penalty).backward()
        assert all(w is seen[-1] for w in seen[-3:]), "the forwards of one step share one tensor"
        sigma = handle.sigmas()["2.weight"].clone()
        optimizer.step()
        assert handle.sigmas()["2.weight"] != sigma
    assert len(seen) == 9
    assert len({id(w) for w in seen}) == 3


def test_evaluation_freezes():
    model = critic()
    gp.spectral_norm_all(model)
    model.eval()
    before = vectors(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train_step(model, optimizer, images())
    assert_unmoved(model, before)
    model.train()
    train_step(model, optimizer, images())
    assert all(not torch.equal(b, before[name]) for name, b in model.named_buffers() if b.numel() > 1)


def test_several_backwards_of_one_step():
    """loss_real.backward(); loss_fake.backward() through the shared weights; a stale graph is refused."""
    model, x, y = critic().double(), images().double(), images().double()
    gp.spectral_norm_all(model)
    joint = torch.autograd.grad(model(x).mean() - model(y).mean(), list(model.parameters()))
    model(x).mean().backward()
    model(y).mean().neg().backward()
    plain.assert_close([p.grad for p in model.parameters()], joint)
    stale = model(x).mean()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="changed in place since it was used"):
        stale.backward()


def test_a_zero_weight_gives_no_nan():
    """Defect: zero weight under SN -> NaN. It is left as it is and can leave zero."""
    model = critic()
    nn.init.zeros_(model[2].weight)
    gp.spectral_norm_all(model)
    assert not model[2].weight.any()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        train_step(model, optimizer, images())
    assert torch.isfinite(model(images())).all()
    assert model[2].weight.abs().max() > 0
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_gradients_are_those_of_autograd():
    """With u and v constants, W / (u . W v) written out; to the second order."""
    module = gp.spectral_norm(nn.Conv2d(3, 4, 3).double(), target=1.5)
    sn = module.parametrizations.weight[0]
    original = module.parametrizations.weight.original

    def value(w):
        sigma = sn._u @ (w.flatten(1) @ sn._v)
        return 1.5 * w / sigma

    def ours(w):
        return gp.spectral_normalize(w, sn._u, sn._v, n_power_iterations=0, target=1.5)

    assert torch.autograd.gradcheck(ours, original)
    assert torch.autograd.gradgradcheck(ours, original)
    seed = torch.randn_like(original)
    (wanted,) = torch.autograd.grad(value(original), original, seed)
    for f in (ours, lambda w: module.weight):
        torch.testing.assert_close(f(original), value(original))
        (found,) = torch.autograd.grad(f(original), original, seed)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_spectral_normalize_iterates_in_place():
    w = torch.randn(5, 3, 2)
    u, v = F.normalize(torch.randn(3), dim=0), F.normalize(torch.randn(10), dim=0)
    for _ in range(2):
        wanted = F.normalize(matrix(w, 1).T @ u, dim=0)
        out = gp.spectral_normalize(w, u, v, dim=-2)
        torch.testing.assert_close(v, wanted)
    gp.spectral_normalize(w, u, v, dim=1, n_power_iterations=200)
    assert largest(gp.spectral_normalize(w, u, v, dim=1), 1) == pytest.approx(1, rel=1e-5)
    assert out.shape == w.shape


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
    "same": (nn.Conv2d(2, 3, 3, padding=1), (5, 6)),
    "stride": (nn.Conv2d(2, 3, 4, 2, 1), (6, 6)),
    "groups, dilation": (nn.Conv1d(4, 6, 3, dilation=2, groups=2), (9,)),
    "circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (4, 4)),
    "transposed": (nn.ConvTranspose2d(3, 2, 4, 2, 1, output_padding=1), (3, 4)),
}


def operator(module, shape):
    """A convolution as a matrix, an image at a time."""
    size = module.in_channels * torch.Size(shape).numel()
    basis = torch.eye(size, dtype=module.weight.dtype).view(size, module.in_channels, *shape)
    with torch.no_grad():
        return (module(basis) - module(torch.zeros_like(basis))).flatten(1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_norm_of_a_convolution_as_an_operator(name):
    module, shape = copy.deepcopy(CONVOLUTIONS[name][0]).double(), CONVOLUTIONS[name][1]
    wanted = torch.linalg.svdvals(operator(module, shape))[0]
    torch.testing.assert_close(gp.convolution_norm(module, shape, iterations=2000), wanted, rtol=1e-4, atol=0)
    gp.spectral_norm(module, norm="convolution", input_shape=(module.in_channels, *shape), target=0.5)
    handle = gp.spectral_norm_handle(module)
    handle.update(2000)
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
    assert_unmoved(copy.deepcopy(module), before)


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
