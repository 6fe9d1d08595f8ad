"""Hooks of every kind, and a critic's own tensors used from outside, with penalties: as in plain autograd."""

import warnings

import plain
import pytest
import torch
import zoo
from habits import X
from plain import Net, float64_on_one_thread  # noqa: F401
from test_sharing import MAKERS, other_parameters
from torch import nn

import gpkernels as gp


def double(grad):
    return None if grad is None else 2 * grad  # plain autograd, too, calls hooks with None


def double_all(grads, *unused):
    return tuple(double(g) for g in grads)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("saved", [None, torch.autograd.graph.save_on_cpu], ids=["", "save_on_cpu"])
@pytest.mark.parametrize("make", [MAKERS["flat"], other_parameters], ids=["flat", "others"])
def test_hooks_on_parameters(make, when, saved):
    results = []
    for run in (gp.score_and_penalty, plain.scores_and_penalty):
        torch.manual_seed(1)
        critic, calls = make(), []

        def add_hooks(critic=critic, calls=calls):
            for p in critic.parameters():
                p.register_hook(double)
                p.register_post_accumulate_grad_hook(calls.append)

        if when == "before":
            add_hooks()
        with saved() if saved else torch.enable_grad():
            value = plain.loss(*run(critic, X))
        if when == "after":
            add_hooks()
        value.backward()
        results.append(plain.kept_gradients(critic.parameters()))
        calls = [sum(p is c for c in calls) for p in critic.parameters()]
        assert max(calls) == 1
    plain.assert_close(*results)


def convolutional(place, call, kind=nn.BatchNorm2d):
    """A critic that shows one of its tensors to `call`."""

    def forward(self, x):
        for name, part in (("x", lambda h: h), ("conv", self.first), ("norm", self.norm), ("act", self.act),
                           ("pool", self.pool), ("last", self.last)):  # fmt: skip
            x = part(x)
            if name == place:
                x = call(self, x)
        return self.head(x.flatten(1))

    modules = {"first": nn.Conv2d(3, 4, 3), "norm": kind(4) if kind else nn.Identity(), "act": nn.LeakyReLU(0.2)}
    return Net(forward, pool=nn.MaxPool2d(2), last=nn.Conv2d(4, 2, 2), head=nn.Linear(8, 1), **modules)


PLACES = ("x", "conv", "norm", "act", "pool", "last")
KINDS = pytest.mark.parametrize(
    "kind", [None, nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)], ids=["", "batch", "group"]
)


def hooked(register):
    def call(self, h):
        register(h)
        return h

    return call


@KINDS
@pytest.mark.parametrize("place", PLACES)
def test_hooks_on_tensors_that_double_the_gradient(place, kind):
    plain.assert_same_steps(lambda: convolutional(place, hooked(lambda h: h.register_hook(double)), kind), X)


WITHOUT_NORM = [(None, place) for place in PLACES[1:]]
OFF_THE_NORM = [(nn.BatchNorm2d, place) for place in PLACES[1:] if place not in ("norm", "act")]


@pytest.mark.parametrize(("kind", "place"), [*WITHOUT_NORM, *OFF_THE_NORM])
@pytest.mark.parametrize("which", ["register_hook", "register_prehook"])
def test_hooks_on_nodes(place, kind, which):
    """But not those of a norm: what its nodes exchange, other tensors included, is no promise of torch's."""
    register = hooked(lambda h: getattr(h.grad_fn, which)(double_all))
    plain.assert_same_steps(lambda: convolutional(place, register, kind), X)


HOWS = pytest.mark.parametrize("how", ["retain_grad", "a loss of it", "a hook afterwards", "gradient afterwards"])


@HOWS
@KINDS
@pytest.mark.parametrize("place", PLACES[1:])
def test_tensors_of_the_critic_used_outside(place, kind, how):
    def run(critic, x):
        penalty = gp.gradient_penalty(critic, x, kind="r1")
        return critic(x), penalty, critic.all_kept[0]

    compare_uses(run, place, kind, how)
    if kind is not None:
        compare_uses(lambda critic, x: (*gp.score_and_penalty(critic, x), critic.kept), place, kind, how)


@pytest.mark.parametrize("how", ["retain_grad", "a loss of it"])
@pytest.mark.parametrize("place", PLACES[1:])
def test_tensors_of_a_flat_critic_used_outside(place, how):
    """Where scores and penalty share a backward."""
    compare_uses(lambda critic, x: (*gp.score_and_penalty(critic, x), critic.kept), place, None, how)


def compare_uses(run, place, kind, how):
    def keep(self, h):
        self.kept = h
        self.all_kept.append(h)
        if how == "retain_grad":
            h.retain_grad()
        return h

    def plainly(critic, x):
        scores, penalty = plain.scores_and_penalty(critic, x)
        if run_twice:
            scores = critic(x)
        return scores, penalty, critic.all_kept[0]

    results, run_twice = [], False
    for call in (run, plainly):
        torch.manual_seed(1)
        critic = convolutional(place, keep, kind)
        critic.all_kept = []
        scores, penalty, kept = call(critic, X)
        run_twice = len(critic.all_kept) == 2
        value, extra = plain.loss(scores, penalty), []
        if how == "a hook afterwards":
            kept.register_hook(double)
        elif how == "gradient afterwards":
            extra = plain.gradients(value, [kept], retain_graph=True)
        elif how == "a loss of it":
            value = value + kept.square().mean()
        value.backward()
        if how == "retain_grad":
            assert kept.grad is not None
            extra = [kept.grad]
        results.append([*extra, *plain.kept_gradients(critic.parameters())])
    plain.assert_close(*results)


def test_forward_and_backward_hooks_of_modules():
    def make(calls):
        critic = convolutional("x", lambda self, h: h)
        for name, module in critic.named_children():
            module.register_forward_pre_hook(lambda m, args: (args[0] * 0.9,))
            module.register_forward_hook(lambda m, args, h: h * 1.1)
            module.register_full_backward_hook(lambda m, gi, go, n=name: calls.append((n, *gi, *go)))
            module.register_full_backward_hook(lambda m, gi, go: double_all(gi))
            module.register_full_backward_pre_hook(lambda m, go: double_all(go))
        return critic

    plain.assert_same_steps(lambda: make([]), X)
    seen = [[], []]
    for calls, ours in zip(seen, (False, True), strict=True):
        torch.manual_seed(1)
        plain.step(make(calls), X, True, ours)
    assert {n for n, *_ in seen[0]} == {n for n, *_ in seen[1]}


def test_hooks_of_modules_in_the_old_way():
    def make():
        critic = convolutional("x", lambda self, h: h)
        critic.first.register_backward_hook(lambda m, gi, go: double_all(gi))
        return critic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.assert_same_steps(make, X)


def test_hooks_on_several_tensors_at_once():
    calls = []
    for run in (gp.score_and_penalty, plain.scores_and_penalty):
        torch.manual_seed(1)
        critic, seen = zoo.dcgan(size=8), []
        value = plain.loss(*run(critic, X))
        torch.autograd.graph.register_multi_grad_hook(list(critic.parameters()), seen.append)
        value.backward()
        calls.append(seen)
    assert len(calls[0]) == len(calls[1]) == 1
    plain.assert_close(calls[0][0], calls[1][0])
