"""What an update of u and v leaves for the reads after it."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from spectral_layers import linears, originals
from torch import nn

import gpkernels as gp
from gpkernels import registry
from gpkernels.spectral import group as groups
from gpkernels.spectral import results


def updated(width=8):
    model, handle = linears(width)
    handle.update()
    return model, handle


def plain(model):
    """Every weight over u . (W v), with gradients, in plain torch."""
    found = []
    for layer in model:
        norm, w = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        found.append(w / (norm._u.clone() @ w @ norm._v.clone()))
    return found


def norms_of(model):
    return [layer.parametrizations.weight[0] for layer in model]


def test_forwards_share_one_node_and_reads_without_gradients_its_memory():
    model, _ = updated()
    with torch.no_grad():
        before = [layer.weight for layer in model]
    first, second = ([layer.weight for layer in model] for _ in range(2))
    with torch.no_grad():
        after = [layer.weight for layer in model]
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert len({x.grad_fn for x in first}) == 1
    for x, *others in zip(first, before, after, strict=True):
        assert x.requires_grad
        assert all(x.data_ptr() == other.data_ptr() and not other.requires_grad for other in others)


@pytest.mark.parametrize("layers", [[0, 1, 2], [1], [2, 0]], ids=str)
def test_gradients_of_all_layers_and_of_some(layers, backend, device):
    model, handle = linears(8)
    model = model.to(device)
    handle.update()
    weights, wanted = [layer.weight for layer in model], plain(model)
    some = [originals(model)[i] for i in layers]
    got, right = (torch.autograd.grad(sum(x[i].exp().sum() for i in layers), some) for x in (weights, wanted))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_a_weight_that_somebody_wrote_to_is_made_anew():
    model, _ = updated()
    wanted = [x.detach() for x in plain(model)]
    for grads in (False, True):
        with torch.set_grad_enabled(grads):
            model[0].weight.detach().zero_()
            torch.testing.assert_close([layer.weight.detach() for layer in model], wanted)
            assert model[0].weight.requires_grad == grads


def test_frozen_layers_have_no_graph_until_they_are_thawed():
    model, _ = linears(8)
    originals(model)[1].requires_grad_(False)
    gp.spectral_norm_handle(model).update()
    weights = [layer.weight for layer in model]
    assert [w.requires_grad for w in weights] == [True, False, True]
    originals(model)[1].requires_grad_(True)
    weights, wanted = [layer.weight for layer in model], plain(model)
    assert all(w.requires_grad for w in weights)
    got, right = (torch.autograd.grad(sum(x.exp().sum() for x in xs), originals(model)) for xs in (weights, wanted))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


def test_a_layer_that_changed_after_the_update_is_measured_by_itself():
    model, _ = updated()
    others = [model[1].weight, model[2].weight]
    with torch.no_grad():
        originals(model)[0].mul_(3.0)
    torch.testing.assert_close([layer.weight for layer in model], plain(model))
    assert [model[1].weight is others[0], model[2].weight is others[1]] == [True, True]


def test_an_update_of_some_layers_lets_their_old_weights_go():
    """Two optimizers, each with its layers."""
    model, _ = updated()
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (model[:1], model[1:])]
    watched = [weakref.ref(layer.weight.untyped_storage()) for layer in model]
    model(torch.randn(4, 8)).sum().backward()
    optimizers[0].step()
    gc.collect()
    assert [w() is None for w in watched] == [True, False, False]
    torch.testing.assert_close([layer.weight for layer in model], plain(model))
    optimizers[1].step()
    gc.collect()
    assert [w() is None for w in watched] == [True, True, True]


def test_weights_that_nobody_has_read_go_too():
    model, _ = updated()
    first = norms_of(model)[0].known
    watched = weakref.ref(first.update.values[first.index].untyped_storage())
    optimizer = torch.optim.SGD([originals(model)[0]], 0.1)
    originals(model)[0].grad = torch.ones(8, 8)
    optimizer.step()
    torch.testing.assert_close([layer.weight for layer in model], plain(model))
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("read", [True, False])
def test_old_weights_go_before_new_ones_are_made(read, monkeypatch):
    model, handle = updated()
    if read:
        assert model(torch.randn(4, 8)).requires_grad
    values, alive = norms_of(model)[0].known.update.values, []
    watched = [weakref.ref(value.untyped_storage()) for value in values]
    update = groups.spectral_update

    def look(*arguments):
        alive.extend(w() is not None for w in watched)
        return update(*arguments)

    monkeypatch.setattr(groups, "spectral_update", look)
    handle.update()
    assert alive == [False] * 3


def test_an_update_that_fails_leaves_right_weights(monkeypatch):
    """Even if it has moved the vectors already."""
    model, handle = updated()
    update = groups.spectral_update

    def fail(*arguments):
        update(*arguments)
        raise MemoryError("none left")

    monkeypatch.setattr(groups, "spectral_update", fail)
    with torch.no_grad():
        originals(model)[0].mul_(2.0)
    with pytest.raises(MemoryError, match="none left"):
        handle.update()
    torch.testing.assert_close([layer.weight for layer in model], plain(model))
    monkeypatch.undo()
    handle.update()
    torch.testing.assert_close([layer.weight for layer in model], plain(model))


def test_an_update_in_inference_mode_serves_training_after_it():
    model, handle = linears(8)
    with torch.inference_mode():
        handle.update()
        assert not model[0].weight.requires_grad
    weights, wanted = [layer.weight for layer in model], plain(model)
    got, right = (torch.autograd.grad(sum(x.exp().sum() for x in xs), originals(model)) for xs in (weights, wanted))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """Of the two functions that can move the vectors of a group."""
    found = []
    for name in ("spectral_update", "spectral_iterate"):
        f = getattr(groups, name)
        monkeypatch.setattr(groups, name, lambda *args, f=f, name=name: found.append(name) or f(*args))
    return found


def test_a_captured_graph_finds_every_later_sigma_where_the_first_was(monkeypatch):
    model, handle = updated()
    with monkeypatch.context() as capture:
        capture.setattr(results, "capturing", lambda x: True)
        assert model[0].weight.requires_grad
    places = [norm.known.update.place(norm.known.index) for norm in norms_of(model)]
    for factor in (2.0, 3.0, 0.5):
        with torch.no_grad():
            for w in originals(model):
                w.mul_(factor)
        handle.update()
        torch.testing.assert_close([sigma[at] for sigma, at in places], list(handle.sigmas().values()))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_makes_no_weights_for_later(training, calls):
    model, handle = linears(8)
    model.train(training)
    calls.clear()
    handle.update(15)
    assert calls == ["spectral_update" if training else "spectral_iterate"]


def test_captured_graphs_make_their_own_weights(calls, monkeypatch):
    """In a capture an update leaves none, which would be in the graph's memory; after a read in one, neither."""
    model, handle = updated()
    calls.clear()
    with monkeypatch.context() as capture:
        capture.setattr(results, "capturing", lambda x: True)
        handle.update()
        assert calls == ["spectral_iterate"]
    handle.update()
    assert calls == ["spectral_iterate", "spectral_update"]
    with monkeypatch.context() as capture:
        capture.setattr(results, "capturing", lambda x: True)
        assert model[0].weight.requires_grad
    calls.clear()
    handle.update()
    assert calls == ["spectral_iterate"]
    torch.testing.assert_close([layer.weight for layer in model], plain(model))


def test_every_backend_leaves_the_state_that_reads_find(backend, device):
    """Else each read would measure sigma again."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 1)).to(device)
    net[1].to(memory_format=torch.channels_last)
    handle = gp.spectral_norm_all(net)
    for iterations in (None, 3):
        handle.update(iterations)
        for layer, norm in zip(net, norms_of(net), strict=True):
            assert norm.is_known(norm.state(norm.original()))
            value = layer.weight
            assert value is layer.weight
            assert value is norm.known.update.values[norm.known.index]
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_updates_and_reads_in_threads():
    model, handle = updated(32)
    twin, errors = copy.deepcopy(model), []
    for _ in range(20):
        gp.spectral_norm_handle(twin).update()
    wanted = [x.detach() for x in plain(twin)]

    def read(grads):
        try:
            for _ in range(200):
                with torch.set_grad_enabled(grads):
                    for layer in model:
                        assert layer.weight.requires_grad == grads
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(i % 2 == 0,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        handle.update()
    for thread in threads:
        thread.join()
    assert not errors
    torch.testing.assert_close([layer.weight.detach() for layer in model], wanted)


def test_the_registry_has_an_update_for_every_backend():
    assert all(row.update for (op, _), row in registry._rows.items() if op == "spectral_norm")
