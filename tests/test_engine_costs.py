"""What the second-order engine saves, as exact counts: convolutions, dispatched ops, saved tensors; and that it leaks
nothing."""

import copy
import gc

import plain
import pytest
import torch
import zoo
from plain import float64_on_one_thread  # noqa: F401
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

import gpkernels as gp

aten = torch.ops.aten
FREE = {"detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"}


class Counts(TorchDispatchMode):
    """Ops that compute, and convolutions in units of one pass: forward, gradient in x, gradient in w."""

    def __init__(self):
        super().__init__()
        self.launches, self.forwards, self.to_input, self.to_weight = [], 0, [], 0

    @property
    def units(self):
        return self.forwards + len(self.to_input) + self.to_weight

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.launches.append(name)
        if name == "convolution":
            self.forwards += 1
        elif name == "convolution_backward":
            self.to_input += [args[1].shape] * args[-1][0]
            self.to_weight += args[-1][1]
        elif name == "conv2d_input_gradient":
            self.to_input += [args[2].shape]
        return func(*args, **(kwargs or {}))


def dcgan64(norm="none", width=4):
    wrap = spectral_norm if norm == "spectral" else (lambda layer: layer)
    layers, inputs = [], 3
    for i in range(4):
        outputs = width * 2**i
        layers += [wrap(nn.Conv2d(inputs, outputs, 4, 2, 1, bias=norm != "batch" or i == 0))]
        layers += [nn.BatchNorm2d(outputs)] if norm == "batch" and i else []
        layers += [nn.LeakyReLU(0.2, True)]
        inputs = outputs
    return nn.Sequential(*layers, wrap(nn.Conv2d(inputs, 1, 4)))


LAYERS = 5


def images():
    return torch.randn(2, 3, 64, 64)


def count(run):
    """Warm up, for caches; then count."""
    run()
    with Counts() as counts:
        run()
    return counts


def penalty_step(critic, x, run=None):
    def step():
        critic.zero_grad()
        (gp.gradient_penalty(critic, x, kind="r1") if run is None else run(critic, x)[1]).backward()

    return step


def joint_step(critic, x, run=gp.score_and_penalty):
    def step():
        critic.zero_grad()
        plain.loss(*run(critic, x)).backward()

    return step


@pytest.mark.parametrize("norm", ["none", "spectral"])
def test_convolutions_of_a_penalty_step(norm):
    critic, x = dcgan64(norm), images()
    eager = count(penalty_step(critic, x, plain.scores_and_penalty))
    ours = count(penalty_step(critic, x))
    print(f"{norm}: penalty step {ours.units} units, eager {eager.units}, of {LAYERS} layers")
    assert ours.units <= 4 * LAYERS
    assert eager.units >= 5.5 * LAYERS


@pytest.mark.parametrize(("norm", "most"), [("none", 4), ("spectral", 4), ("batch", 6)])
def test_convolutions_of_scores_and_penalty(norm, most):
    critic, x = dcgan64(norm), images()
    eager = count(joint_step(critic, x, plain.scores_and_penalty))
    ours = count(joint_step(critic, x))
    print(f"{norm}: joint step {ours.units} units, eager {eager.units}, of {LAYERS} layers")
    assert ours.units <= most * LAYERS
    assert ours.units < eager.units


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_gradient_in_x_computes_none_in_weights(norm):
    critic, x = dcgan64(norm), images().requires_grad_()
    with gp.fast_double_backward():
        scores = critic(x)
    with Counts() as counts:
        torch.autograd.grad(scores.sum(), x, create_graph=True)
    assert counts.to_weight == 0
    assert len(counts.to_input) == LAYERS


@pytest.mark.parametrize("critic", [dcgan64(), dcgan64("batch"), nn.Sequential(nn.Conv2d(3, 4, 4, 2), nn.SiLU(),
                                                                             nn.Conv2d(4, 1, 31))])  # fmt: skip
def test_the_backward_computes_no_gradient_at_x(critic):
    critic, x = copy.deepcopy(critic).to(torch.float64), images()
    for run in (
        lambda: gp.gradient_penalty(critic, x, kind="r1"),
        lambda: plain.loss(*gp.score_and_penalty(critic, x)),
    ):
        with Counts() as forward:
            value = run()
        with Counts() as backward:
            value.backward()
        assert forward.to_input.count(x.shape) == 1
        assert backward.to_input.count(x.shape) == 0


def test_frozen_weights_cost_nothing():
    critic, x = dcgan64(), images()
    for p in critic[:4].parameters():
        p.requires_grad_(False)
    counts = count(penalty_step(critic, x))
    assert counts.to_weight == LAYERS - 2


@pytest.mark.parametrize(("norm", "most"), [("none", 50), ("batch", 80)])
def test_launches_of_a_penalty_step(norm, most):
    critic, x = dcgan64(norm), images()
    eager = count(penalty_step(critic, x, plain.scores_and_penalty))
    ours = count(penalty_step(critic, x))
    names = {name: ours.launches.count(name) for name in sorted(set(ours.launches))}
    print(f"{norm}: {len(ours.launches)} launches, eager {len(eager.launches)}: {names}")
    assert len(ours.launches) <= most


class Saved:
    """What autograd keeps: how many bytes are alive, each storage counted once however often it is saved."""

    def __init__(self):
        self.saves, self.alive, self.peak = {}, 0, 0

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(lambda t: Kept(self, t), lambda kept: kept.tensor)


class Kept:
    def __init__(self, saved, tensor):
        self.saved, self.tensor = saved, tensor.detach()  # the tensor itself may own this object
        self.storage = tensor.untyped_storage().data_ptr()
        self.size = tensor.untyped_storage().nbytes()
        saves = saved.saves
        saves[self.storage] = saves.get(self.storage, 0) + 1
        saved.alive += self.size * (saves[self.storage] == 1)
        saved.peak = max(saved.peak, saved.alive)

    def __del__(self):
        saves = self.saved.saves
        saves[self.storage] -= 1
        self.saved.alive -= self.size * (saves[self.storage] == 0)


def peak(run):
    """Of the saved tensors, all of which must be gone after it."""
    saved = Saved()
    gc.collect()
    gc.disable()
    try:
        with saved.hooks():
            run()
        assert saved.alive == 0
    finally:
        gc.enable()
    return saved.peak


@pytest.mark.parametrize("norm", ["none", "spectral", "batch"])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("step", [penalty_step, joint_step])
def test_memory_of_saved_tensors(norm, inplace, step):
    """No more than plain autograd keeps."""
    critic, x = dcgan64(norm, 16), images()
    for layer in critic:
        if isinstance(layer, nn.LeakyReLU):
            layer.inplace = inplace
    eager, ours = peak(step(critic, x, plain.scores_and_penalty)), peak(step(critic, x))
    print(f"{norm}, inplace={inplace}: saved {ours} bytes, eager {eager}, ratio {ours / eager:.2f}")
    assert ours <= 1.01 * eager


def functions_alive():
    return sum(
        "gpkernels" in getattr(getattr(type(o), "_forward_cls", int), "__module__", "") for o in gc.get_objects()
    )


@pytest.mark.parametrize("name", ["dcgan batch", "sngan projection"])
@pytest.mark.parametrize("use", ["backward", "no backward", "scores alone", "penalty alone", "retained", "error"])
def test_nothing_is_kept_over_steps(name, use):
    critic, x, kwargs = zoo.make(name)
    gc.collect()
    before = functions_alive()
    for _ in range(3):
        scores, penalty = gp.score_and_penalty(critic, x, critic_kwargs=kwargs)
        value = {"scores alone": scores.sum(), "penalty alone": penalty}.get(use, plain.loss(scores, penalty))
        if use == "retained":
            value.backward(retain_graph=True)
        if use == "error":
            with pytest.raises(ValueError, match="critic: wanted"):
                gp.gradient_penalty(lambda x: critic(x, **kwargs)[:2], x, kind="r1")
        if use != "no backward":
            value.backward()
        gp.gradient_penalty(critic, x, kind="r1", critic_kwargs=kwargs)
    gc.disable()
    del scores, penalty, value
    try:
        assert functions_alive() == before, "reference cycles"
    finally:
        gc.enable()
