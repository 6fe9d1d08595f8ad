"""What happens to a spectrally normalised model: copies, pickles, checkpoints, averages, changes, dtypes, layouts;
tests/test_spectral_runs.py has the ways to run one."""

import copy
import io
import pickle

import pytest
import torch
from test_engine_costs import Counts
from test_spectral_modules import ThroughData, assert_unmoved, critic, images, largest, train_step, vectors
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gpkernels as gp


def normalised(seed=1, **options):
    torch.manual_seed(seed)
    model = critic()
    gp.spectral_norm_all(model, **options)
    return model


def adam(model):
    return torch.optim.Adam(model.parameters(), 1e-2)


def train(model, optimizer, steps, seed=2):
    torch.manual_seed(seed)
    for _ in range(steps):
        train_step(model, optimizer, images())


def assert_equal(a, b):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, unpickled, saved])
@pytest.mark.parametrize("update", ["step", "read"])
def test_copies_and_pickles_live_on_their_own(make, update):
    model = normalised(update=update)
    optimizer = adam(model)
    train(model, optimizer, 2)
    model(images())  # leave results in the cache
    twin = make(model)
    assert_equal(model, twin)
    kept = copy.deepcopy(model.state_dict())
    twin_optimizer = adam(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(twin, twin_optimizer, 3)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items()), "training a copy moves the original"
    train(model, optimizer, 3)
    assert_equal(model, twin)
    handle = gp.spectral_norm_handle(twin)
    assert len(handle) == 3
    handle.remove()
    assert len(gp.spectral_norm_handle(model)) == 3
    model(images())


def test_a_copied_layer_takes_only_itself():
    model = normalised()
    layer = copy.deepcopy(model[2])
    group = layer.parametrizations.weight[0].group
    assert len(list(group.watched())) == 1
    assert len(list(model[0].parametrizations.weight[0].group.watched())) == 3
    assert len(pickle.dumps(model[0])) < len(pickle.dumps(model))
    torch.testing.assert_close(layer.weight, model[2].weight)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_resumed_run_goes_on_to_the_bit(assign, channels_last):
    layout = {"memory_format": torch.channels_last} if channels_last else {}
    model = normalised().to(**layout)
    optimizer = adam(model)
    train(model, optimizer, 3)
    state, steps = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = normalised(seed=5).to(**layout)
    with torch.no_grad():
        again(images())
    again.load_state_dict(state, strict=True, assign=assign)
    again_optimizer = adam(again)
    again_optimizer.load_state_dict(steps)
    for seed in (7, 8):
        for net, opt in ((model, optimizer), (again, again_optimizer)):
            torch.manual_seed(seed)
            real, fake = images(), images()
            opt.zero_grad()
            eps = torch.full((4,), 0.3)
            loss = net(fake).mean() - net(real).mean() + gp.gradient_penalty(net, real, fake, eps=eps)
            loss.backward()
            opt.step()
        assert_equal(model, again)


def test_torchs_checkpoints_load_strictly_and_go_back():
    theirs = critic()
    for i in (0, 2, 5):
        parametrizations.spectral_norm(theirs[i])
    train(theirs, adam(theirs), 3)
    ours = normalised()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images()
    torch.testing.assert_close(ours(x), theirs.eval()(x))
    theirs.load_state_dict(normalised(seed=9).state_dict(), strict=True)
    torch.testing.assert_close(theirs(x), normalised(seed=9)(x))


def averaged(model, use_buffers):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("mode", [True, False])
def test_averaged_model(use_buffers, mode):
    """Defect: EMA averaging u, v. Averages are not of length 1; the read takes their directions."""
    model = normalised()
    optimizer, average = adam(model), averaged(model, use_buffers).train(mode)
    for step in range(60):
        train(model, optimizer, 1, seed=step)
        average.update_parameters(model)
    x = images()
    before = vectors(average)
    with torch.no_grad():
        first = average(x)
        torch.testing.assert_close(average(x), first, rtol=0, atol=0)
    assert_unmoved(average, before)
    for i in (0, 2, 5):
        sn = average.module[i].parametrizations.weight
        sigma = (sn.original / average.module[i].weight).mean()
        u, v = sn[0]._u, sn[0]._v
        wanted = u @ sn.original.flatten(1) @ v / (u.norm() * v.norm())
        torch.testing.assert_close(sigma, wanted, rtol=1e-4, atol=0)
    gp.spectral_norm_handle(average).update(100)
    assert [largest(average.module[i].weight) for i in (0, 2, 5)] == pytest.approx([1] * 3, rel=1e-3)
    train(model, optimizer, 1)
    assert len(gp.spectral_norm_handle(average)) == 3


def test_an_average_through_data_is_seen():
    """Versions do not show it: no result of an average's reads may be kept."""
    model = normalised()
    average = copy.deepcopy(model).requires_grad_(False)
    fresh = normalised(seed=3)
    x = images()
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            average(x)
            for p, q in zip(average.parameters(), fresh.parameters(), strict=True):
                p.data.mul_(0.5).add_(q.data, alpha=0.5)
            wanted = copy.deepcopy(average)
            torch.testing.assert_close(average(x), wanted(x))


def rounded(weight):
    """So near that u and v are good for it, but no multiple, which would be normalised to the same."""
    return 2 * weight.detach() + 1e-2 * weight.detach().sign()


def change_in_place(model):
    weight = model[2].parametrizations.weight.original
    with torch.no_grad():
        weight.copy_(rounded(weight))


def change_data(model):
    weight = model[2].parametrizations.weight.original
    weight.data = rounded(weight)


def change_parameter(model):
    owner = model[2].parametrizations.weight
    owner.original = nn.Parameter(rounded(owner.original))


def change_by_assignment(model):
    model[2].weight = rounded(model[2].parametrizations.weight.original)


@pytest.mark.parametrize("change", [change_in_place, change_data, change_parameter, change_by_assignment])
@pytest.mark.parametrize("grads", [True, False])
def test_a_changed_weight_is_normalised_anew(change, grads):
    model = normalised()
    x = images()
    with torch.set_grad_enabled(grads):
        stale = model(x)
        change(model)
        before = vectors(model)
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
        assert not torch.allclose(model(x), stale)
    assert_unmoved(model, before)
    train(model, adam(model), 2)


def test_a_result_that_was_written_to_is_made_anew():
    model = normalised()
    gp.spectral_norm_handle(model).update()
    wanted = model[2].weight.detach().clone()
    for grads in (True, False):
        other = model[0].weight
        with torch.no_grad():
            model[2].weight.zero_()
        with torch.set_grad_enabled(grads):
            torch.testing.assert_close(model[2].weight, wanted)
        assert model[0].weight is other, "the others are as they were"


def test_u_and_v_written_before_the_backward_with_the_same_values():
    """As DistributedDataParallel does at the next forward."""
    model, x = normalised(), images()
    wanted = torch.autograd.grad(model(x).mean(), list(model.parameters()))
    value = model(x).mean()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(buffer.clone())
    found = torch.autograd.grad(value, list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grads", [True, False])
def test_an_optimizer_that_leaves_versions_alone_in_evaluation(grads):
    model, x = normalised().eval(), images()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    before = vectors(model)
    for _ in range(2):
        train_step(model, optimizer, x)
        with torch.set_grad_enabled(grads):
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
    assert_unmoved(model, before)
    model.train()
    train_step(model, optimizer, x)
    assert not model[0].parametrizations.weight[0].known.results, "a step drops what it made stale"
    model.eval()
    train_step(model, ThroughData(model.parameters()), x)
    torch.testing.assert_close(model.train()(x), copy.deepcopy(model)(x))


def test_gradients_and_none_in_turn():
    model = normalised()
    x = images().requires_grad_()
    with torch.no_grad():
        values = model(x)
    loss = model(x)
    torch.testing.assert_close(loss, values)
    loss.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.requires_grad_(False)  # the generator's step
    (grad,) = torch.autograd.grad(model(x).mean(), x)
    assert grad.any()
    with torch.inference_mode():
        torch.testing.assert_close(model(x.detach()), values)
    torch.testing.assert_close(torch.autograd.grad(model(x).mean(), x)[0], grad)
    model.requires_grad_()
    model[2].requires_grad_(False)
    with Counts() as counts:
        model(x).mean().backward()
    assert counts.to_weight == 1, "a frozen weight costs no gradient"
    assert not model[2].weight.requires_grad


def test_remove():
    for leave in (True, False):
        model = normalised()
        x, parameters = images(), list(model.parameters())
        wanted = model(x) if leave else None
        handle = gp.spectral_norm_handle(model)
        handle.remove(leave_parametrized=leave)
        assert len(handle) == 0
        assert sorted(map(id, model.parameters())) == sorted(map(id, parameters))
        assert not any(parametrize.is_parametrized(m) for m in model.modules())
        if leave:
            torch.testing.assert_close(model(x), wanted)
        train(model, adam(model), 1)
    model = normalised()
    wanted = model(x)
    parametrize.remove_parametrizations(model[2], "weight")
    torch.testing.assert_close(model(x), wanted)
    train(model, adam(model), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = normalised().to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {b.dtype for b in model.buffers()} == {wide}
    assert model[2].weight.dtype == dtype
    train_step(model, torch.optim.SGD(model.parameters(), 1e-2), images().to(dtype))
    assert {b.dtype for b in model.buffers()} == {wide}
    assert largest(model[2].weight.float()) == pytest.approx(1, rel=0.05)
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert {b.dtype for b in model.buffers()} == {wide}


@pytest.mark.parametrize("update", ["step", "read"])
def test_autocast(update):
    model, x = normalised(update=update), images()
    wanted = copy.deepcopy(model)[2].weight
    with torch.autocast("cpu", torch.bfloat16):
        weight = model[2].weight
        scores = model(x)
        assert weight.dtype == torch.float32
        assert scores.dtype == torch.bfloat16
        torch.testing.assert_close(weight, wanted)
        scores.mean().backward()
        adam(model).step()
    torch.testing.assert_close(scores.float(), copy.deepcopy(normalised(update=update))(x), rtol=0.05, atol=0.05)


def test_channels_last():
    model = normalised()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert not other[2].parametrizations.weight.original.is_contiguous()
    assert other[2].weight.is_contiguous(memory_format=torch.channels_last)
    train(model, adam(model), 3)
    train(other, adam(other), 3)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_changed_layer_read_after_one_that_has_not():
    """The first read of a pass computes other layers too, each with a sigma of its own weight."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = gp.spectral_norm_all(model)
    handle.update()
    originals = [layer.parametrizations.weight.original for layer in model]
    with torch.no_grad():
        originals[1].mul_(3)
    wanted = [w / s for w, s in zip(originals, handle.sigmas().values(), strict=True)]
    torch.testing.assert_close([layer.weight for layer in model], wanted)
