"""The ways to run a spectrally normalised model: compilers, transforms, checkpointing, threads, processes, CUDA graphs,
and the second-order engine, whose fast path and exactness it must leave alone."""

import collections
import copy
import gc
import threading
import weakref

import plain
import pytest
import torch
from test_engine_costs import count, dcgan64, joint_step, penalty_step
from test_engine_processes import ddp_data, ddp_loss
from test_spectral_modules import critic, images, largest, train_step
from test_spectral_survives import adam, normalised, train
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import gpkernels as gp


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


def test_a_compiled_step():
    """The hooks are a graph break, and move u and v."""
    torch.compiler.reset()
    model = normalised()
    twin = copy.deepcopy(model)
    optimizers = [adam(model), adam(twin)]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend="eager")]
    for seed in range(3):
        for net, optimizer, step in zip((model, twin), optimizers, steps, strict=True):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            net(images()).square().mean().backward()
            step()
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, x = normalised(), images().requires_grad_()
    wanted = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    for fresh in (model, copy.deepcopy(model)):
        checkpoint(fresh, x, use_reentrant=reentrant).square().mean().backward()
        plain.assert_close([p.grad for p in fresh.parameters()], wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graphed_step_is_the_step():
    """Replays move u, v and sigma, and evaluation between them sees it."""
    models = [normalised().cuda() for _ in range(2)]
    batches = [[torch.randn(8, 3, 16, 16, device="cuda") for _ in range(2)] for _ in range(6)]
    seen = []
    for model, wrap in zip(models, (lambda step: step, lambda step: gp.graphed(step, warmup=2)), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, capturable=True)

        def step(real, fake, model=model, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = (model(fake) - model(real)).mean() + gp.gradient_penalty(model, real, kind="r1")
            loss.backward()
            optimizer.step()
            return loss.detach()

        run, x = wrap(step), batches[0][0]
        for batch in batches:
            run(*batch)
            with torch.no_grad():
                seen.append(model(x).clone())
    for a, b in zip(seen[:6], seen[6:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
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


class Dropped(dict):
    """Results that another thread drops as soon as they are there."""

    def __setitem__(self, key, value):
        pass


@pytest.mark.parametrize("updated", [False, True])
@pytest.mark.parametrize("grads", [False, True])
def test_results_that_another_thread_drops(grads, updated):
    model, x = normalised(), images()
    if updated:
        gp.spectral_norm_handle(model).update()
    wanted = model(x).detach()
    for layer in model:
        if parametrize.is_parametrized(layer):
            layer.parametrizations.weight[0].known.results = Dropped()
    with torch.set_grad_enabled(grads):
        got = model(x)
    assert got.requires_grad == grads
    torch.testing.assert_close(got.detach(), wanted)


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


def test_calls_of_a_whole_step():
    """Real, fake and penalty forwards, the backward and the optimizer's step: two calls more than without."""
    net, x = dcgan64(), torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)

    def step():
        optimizer.zero_grad()
        (net(x).mean() - net(-x).mean() + gp.gradient_penalty(net, x, kind="r1")).backward()
        optimizer.step()

    without = collections.Counter(count(step).launches)
    gp.spectral_norm_all(net)
    extra = collections.Counter(count(step).launches) - without
    assert extra == {"spectral_norm_update": 1, "spectral_norm_scale_backward": 1}


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
    torch.manual_seed(rank)
    model = critic()
    gp.spectral_norm_all(model)
    model.double()
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
    with torch.no_grad():
        assert [largest(model[i].weight) for i in (0, 2, 5)] == pytest.approx([1] * 3, rel=0.1)
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
    """Though each draws weights of its own, which rank 0's replace, with or without u and v."""
    torch.multiprocessing.spawn(ddp_process, (str(tmp_path),), nprocs=2)
    for broadcast in (True, False):
        found = [torch.load(tmp_path / f"{broadcast}-{rank}.pt") for rank in (0, 1)]
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
