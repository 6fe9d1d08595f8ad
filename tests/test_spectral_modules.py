"""Spectral norm of modules: against svd and torch's own, one sigma a step, pure reads, and the defects of public code.
tests/test_spectral_options.py has the options, tests/test_spectral_survives.py what happens to a model around it."""

import copy

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

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
    assert largest(gp.spectral_norm(nn.Conv2d(8, 16, 3)).weight) == pytest.approx(1, rel=0.1)


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
