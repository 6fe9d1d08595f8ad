"""What happens to a spectrally normalised model: copies, pickles, checkpoints, averages, dtypes, layouts, compilers,
threads, processes, the second-order engine."""

import copy
import gc
import io
import pickle
import threading
import weakref

import plain
import pytest
import torch
from test_engine_costs import Counts, count, dcgan64, joint_step, penalty_step
from test_engine_processes import ddp_data, ddp_loss
from test_spectral_modules import assert_unmoved, critic, images, largest, train_step, vectors
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
    assert len(list(group.members())) == 1
    assert len(list(model[0].parametrizations.weight[0].group.members())) == 3
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


def change_in_place(model):
    with torch.no_grad():
        model[2].parametrizations.weight.original.mul_(2)


def change_data(model):
    weight = model[2].parametrizations.weight.original
    weight.data = 2 * weight.data


def change_parameter(model):
    owner = model[2].parametrizations.weight
    owner.original = nn.Parameter(2 * owner.original.detach())


def change_by_assignment(model):
    model[2].weight = 2 * model[2].parametrizations.weight.original.detach()


@pytest.mark.parametrize("change", [change_in_place, change_data, change_parameter, change_by_assignment])
@pytest.mark.parametrize("grads", [True, False])
def test_a_changed_weight_is_normalised_anew(change, grads):
    model = normalised()
    x = images()
    wanted = model(x)
    before = vectors(model)
    with torch.set_grad_enabled(grads):
        model(x)
        change(model)
        torch.testing.assert_close(model(x), wanted)
    assert_unmoved(model, before)
    train(model, adam(model), 2)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("update", ["step", "read"])
def test_torch_compile(update):
    """The whole model is one graph; sigma is computed in it."""
    torch.compiler.reset()
    model = normalised(update=update)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    optimizers = [adam(model), adam(twin)]
    for step in range(3):
        torch.manual_seed(step)
        x = images()
        for net, optimizer in zip((model, compiled), optimizers, strict=True):
            train_step(net, optimizer, x)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    compiled.eval()
    model.eval()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def test_transforms_see_through():
    model, x = normalised(), images()
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def loss(parameters):
        return torch.func.functional_call(model, (parameters, buffers), (x,)).square().mean()

    wanted = torch.autograd.grad(model(x).square().mean(), list(parameters.values()))
    found = torch.func.grad(loss)({k: p.detach() for k, p in parameters.items()})
    plain.assert_close(list(found.values()), wanted, tolerance=1e-4)
    plain.assert_close(torch.autograd.grad(loss(parameters), list(parameters.values())), wanted, tolerance=1e-4)
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x))


def test_threads():
    model, x = normalised(), images()
    wanted, errors = model(x).detach(), []

    def run(grads):
        try:
            for _ in range(20):
                with torch.set_grad_enabled(grads):
                    torch.testing.assert_close(model(x).detach(), wanted)
                model[0].parametrizations.weight[0].known.results.clear()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_nothing_keeps_a_model_alive():
    model = normalised()
    train(model, adam(model), 1)
    model(images())
    watched = [weakref.ref(x) for x in (model[2], model[2].parametrizations.weight[0].group)]
    del model
    gc.collect()
    assert [reference() for reference in watched] == [None, None]


@pytest.mark.parametrize("make", ["ours", "torch"])
def test_convolutions_under_the_engine(make):
    """The engine keeps its counts: four passes a layer for a penalty, with scores too."""
    net = dcgan64("spectral" if make == "torch" else "none")
    if make == "ours":
        gp.spectral_norm_all(net)
    x = torch.randn(2, 3, 64, 64)
    assert count(penalty_step(net, x)).units <= 4 * 5
    assert count(joint_step(net, x)).units <= 4 * 5


def test_launches_under_the_engine():
    """Of the normalisation itself, in a step with real, fake and penalty forwards."""
    net = dcgan64()
    x = torch.randn(2, 3, 64, 64)

    def step():
        net.zero_grad()
        (net(x).mean() - net(-x).mean() + gp.gradient_penalty(net, x, kind="r1")).backward()

    without = len(count(step).launches)
    gp.spectral_norm_all(net)
    ours = count(step).launches
    extra = [name for name in ours if "spectral" in name or "foreach" in name]
    assert len(ours) - without <= 12, extra


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_penalty_gradients_are_plain_autograds(both, channels_last):
    layout = {"memory_format": torch.channels_last} if channels_last else {}
    model = normalised().double().to(**layout)
    gp.spectral_norm_handle(model).update()
    twin = critic().double().to(**layout)
    for i in (0, 2, 5):
        parametrizations.spectral_norm(twin[i])
    twin.load_state_dict(model.state_dict())
    x = images().double()
    wanted = plain.step(twin.eval(), x, both, ours=False)
    plain.assert_close(plain.step(model, x, both, ours=True), wanted, tolerance=1e-12)
    plain.assert_close(plain.step(copy.deepcopy(model), x, both, ours=False), wanted, tolerance=1e-12)


def ddp_run(rank, real, fake, broadcast):
    torch.manual_seed(1)
    model = critic().double()
    gp.spectral_norm_all(model)
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
    optimizer = torch.optim.Adam(wrapped.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        ddp_loss("penalty", wrapped, real, fake).backward()
        optimizer.step()
    return [value.clone() for value in model.state_dict().values()]


def ddp_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    real, fake = ddp_data()[:, rank::2].double()
    for broadcast in (True, False):
        torch.save(ddp_run(rank, real, fake, broadcast), f"{folder}/{broadcast}-{rank}.pt")
    gc.collect()
    torch.distributed.destroy_process_group()


def test_ranks_stay_equal(tmp_path):
    torch.multiprocessing.spawn(ddp_process, (str(tmp_path),), nprocs=2)
    for broadcast in (True, False):
        found = [torch.load(tmp_path / f"{broadcast}-{rank}.pt") for rank in (0, 1)]
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
