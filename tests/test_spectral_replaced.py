"""Weights of a spectrally normalised model that change behind its back, and models out of the ordinary: meta, sparse,
stacked, with parts removed."""

import collections
import copy
import weakref

import pytest
import torch
from test_engine_costs import count
from test_spectral_modules import ThroughData, Wrapping, assert_unmoved, images, largest, train_step, vectors
from test_spectral_survives import normalised
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gpkernels as gp
from gpkernels.ops.spectral_norm.autograd import spectral_iterate
from gpkernels.spectral.group import Group
from gpkernels.spectral.vectors import misfits, units


def linears(width=64, **options):
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1))
    return model, gp.spectral_norm_all(model, **options)


def originals(model):
    return [layer.parametrizations.weight.original for layer in model]


@torch.no_grad()
def norms(model):
    return [largest(layer.weight) for layer in model]


def assert_normalised(model):
    assert norms(model) == pytest.approx([1.0] * len(model), rel=0.06)


def assign(model):
    with torch.no_grad():
        for layer in model:
            layer.weight = torch.randn_like(layer.weight)


def initialise(model):
    for weight in originals(model):
        nn.init.normal_(weight)


def load_without_vectors(model):
    other = linears()[0].state_dict()
    model.load_state_dict({k: v for k, v in other.items() if "._" not in k}, strict=False)


@pytest.mark.parametrize("replace", [assign, initialise, load_without_vectors])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_replaced_weight_has_its_own_norm(replace, stepped):
    """Defect: sigma of vectors that have nothing to do with the weight, 20 to 100 times too small, or negative."""
    model, handle = linears()
    optimizer, x = torch.optim.SGD(model.parameters(), 1e-4), torch.randn(2, 64)
    if stepped:
        train_step(model, optimizer, x)
    replace(model)
    before = vectors(model)
    for mode in (False, True):
        assert_normalised(model.train(mode))
        assert_normalised(copy.deepcopy(model))
        sigmas = [s.item() for s in handle.sigmas().values()]
        assert sigmas == pytest.approx([largest(w) for w in originals(model)], rel=0.06)
    assert_unmoved(model, before)
    train_step(model, optimizer, x)
    assert_normalised(model)
    for layer, weight in zip(model, originals(model), strict=True):
        norm = layer.parametrizations.weight[0]
        assert (norm._u @ weight @ norm._v).item() == pytest.approx(largest(weight), rel=0.06)


def test_a_convolution_norm_of_a_replaced_weight():
    model = gp.spectral_norm(nn.Conv2d(3, 8, 3, padding=1), norm="convolution", input_shape=(6, 6))
    for change in (
        lambda: setattr(model, "weight", torch.randn(8, 3, 3, 3)),
        lambda: model.load_state_dict({"parametrizations.weight.original": torch.randn(8, 3, 3, 3)}, strict=False),
    ):
        with torch.no_grad():
            change()
        assert gp.convolution_norm(model, (6, 6)).item() == pytest.approx(1, rel=0.06)
    fresh = gp.spectral_norm(nn.Conv2d(3, 8, 3), norm="convolution", input_shape=(6, 6))
    with torch.no_grad():
        nn.init.orthogonal_(fresh.parametrizations.weight.original)
    train_step(fresh, torch.optim.SGD(fresh.parameters(), 1e-6), torch.randn(1, 3, 6, 6))
    assert gp.convolution_norm(fresh, (6, 6)).item() == pytest.approx(1, rel=0.06)


def test_every_read_mode_leaves_vectors_alone_as_torchs_does():
    model = gp.spectral_norm(nn.Linear(6, 6), update="read")
    before = vectors(model)
    with torch.no_grad():
        model.weight = torch.randn(6, 6)
    assert_unmoved(model, before)
    norm, weight = model.eval().parametrizations.weight[0], model.parametrizations.weight.original
    for _ in range(2):
        norm._u.neg_()
        wanted = weight / (norm._u @ weight @ norm._v).abs()
        torch.testing.assert_close(model.weight, wanted)
        grads = [torch.autograd.grad(w.square().sum(), weight)[0] for w in (model.weight, wanted)]
        torch.testing.assert_close(*grads)


def swap(model):
    for p in model.parameters():
        p.data.copy_(torch.randn_like(p))


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("partly", [False, True])
def test_weights_swapped_through_data_in_evaluation(grads, partly):
    """Defect: the scores of the weights before the swap, which no version shows."""
    model, _ = linears(8)
    x = torch.randn(4, 8)
    train_step(model, torch.optim.SGD(model.parameters(), 0.1), x)
    model(x)
    model.eval()
    for _ in range(2):
        with torch.set_grad_enabled(grads):
            model[0].weight if partly else model(x)
            swap(model)
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x))


def test_a_pass_leaves_nothing_for_later_ones():
    model, x = linears(8)[0].eval(), torch.randn(4, 8)
    _ = model[0].weight  # computes what follows, too
    swap(model)
    with torch.no_grad():
        wanted = model(x), model[1].weight
    torch.testing.assert_close((model[1].weight, model(x)), wanted[::-1])


def test_an_average_in_training_mode_written_through_data():
    model, _ = linears(8)
    average, x = copy.deepcopy(model), torch.randn(4, 8)
    for net in (average, model):
        for _ in range(2):
            net(x)
            swap(net)
            torch.testing.assert_close(net(x), copy.deepcopy(net)(x))


@pytest.mark.parametrize("updated", [False, True])
def test_data_given_at_the_same_address(updated):
    """Defect: the allocator gives the first address back, and nothing seems to have changed. It is held until then."""
    for width in (16, 32):
        model = gp.spectral_norm(nn.Linear(width, width))
        x, weight, handle = (
            torch.randn(2, width),
            model.parametrizations.weight.original,
            gp.spectral_norm_handle(model),
        )
        handle.update()
        model(x)
        storage = weakref.ref(weight.untyped_storage())
        for _ in range(4):
            weight.data = torch.relu(weight.data)
        assert storage() is not None
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-5)
        handle.update()
        assert storage() is None


@pytest.mark.parametrize("make", [lambda m: m, copy.deepcopy, lambda m: m.double()])
@pytest.mark.parametrize("norm", ["matrix", "convolution"])
def test_new_layers_that_are_given_one_weight_get_the_same_vectors(make, norm):
    """As on the ranks of DistributedDataParallel with broadcast_buffers=False."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2))
        gp.spectral_norm_all(model, norm=norm, sample=torch.randn(1, 2, 3, 3))
        models.append(make(model))
    x = torch.ones(1, 2, 3, 3, dtype=models[0][0].bias.dtype)
    with torch.no_grad():
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.copy_(p)
            p.copy_(q)
    for model in models:
        model(x).sum().backward()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        q.grad.copy_(p.grad)
    for model in models:
        torch.optim.SGD(model.parameters(), 0.1).step()
    for a, b in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(a, b)


def test_initialising_the_normalised_weights_through_data_changes_nothing():
    model, _ = linears()
    wanted = [layer.weight.detach().clone() for layer in model]
    model.apply(lambda m: nn.init.normal_(m.weight.data) if isinstance(m, nn.Linear) else None)
    torch.testing.assert_close([layer.weight for layer in model], wanted)


def test_how_long_results_are_kept():
    """Of a loaded model until any step, so that a resumed one has the same nodes; of others while they are in use."""

    def read(layer):
        return weakref.ref(layer.weight)

    model, _ = linears(8)
    new, copied = read(model[0]), read(copy.deepcopy(model)[0])
    assert (new(), copied()) == (None, None)
    model.load_state_dict(linears(8)[0].state_dict())
    kept = read(model[0])
    assert kept() is not None
    torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1).step()
    assert kept() is None


def test_a_weight_read_twice_in_a_pass(monkeypatch):
    model = copy.deepcopy(nn.Sequential(*linears(8)[0], nn.Linear(1, 1))).eval()
    wanted, calls, plain = [layer.weight for layer in model[:3]], [], Group._compute

    def counted(self, members, *rest):
        calls.append(len(members))
        return plain(self, members, *rest)

    monkeypatch.setattr(Group, "_compute", counted)
    for _ in range(2):
        calls.clear()
        found = [(layer.weight, layer.weight)[1] for layer in model[:3]]
        assert calls == [3, 1, 1, 1]
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("state", ["copy", "buffers written", "trained"])
def test_calls_at_any_depth(state):
    """Of a read of all layers: averages, and what DistributedDataParallel leaves before each forward."""
    found = []
    for depth in (3, 12):
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])
        x = torch.randn(2, 8)
        without = collections.Counter(count(lambda model=model, x=x: model(x)).launches)
        handle = gp.spectral_norm_all(model)
        handle.update()
        if state == "copy":
            model = copy.deepcopy(model).eval()

        def run(model=model, x=x, handle=handle):
            if state == "trained":
                handle.update()
            model(x)

        def rewrite(model=model):
            if state == "buffers written":
                for buffer in model.buffers():
                    buffer.copy_(buffer.clone())

        rewrite()
        run()
        rewrite()
        found.append(collections.Counter(count(run).launches) - without)
    assert found[0] == found[1]
    assert sum(found[0].values()) <= {"copy": 25, "buffers written": 12, "trained": 4}[state], found[0]


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
