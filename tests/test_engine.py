"""The second-order engine on whole critics: every critic of the zoo, and critics as people write them, against plain
autograd."""

import copy
import operator

import plain
import pytest
import torch
import torch.nn.functional as F
import zoo
from habits import CRITICS, X, body, conv, net
from plain import float64_on_one_thread  # noqa: F401
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gpkernels as gp

aten = torch.ops.aten
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def point(kind, x, fake):
    """Where the kind penalises, with the draws that gp.gradient_penalty is given."""
    if kind == "coupled":
        eps = torch.linspace(0.1, 0.9, len(x), dtype=x.dtype)
        weight = eps.view(-1, *[1] * (x.dim() - 1))
        return weight * x + (1 - weight) * fake, {"eps": eps}
    if kind == "local":
        generator = torch.Generator().manual_seed(3)
        at = gp.perturb(x, scale=0.5, noise="uniform", relative=True, generator=generator)
        return at, {"generator": generator.manual_seed(3)}
    return x, {}


@DTYPES
@pytest.mark.parametrize("kind", ["coupled", "local", "r1"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_gradient_penalty_of_every_critic(name, kind, dtype):
    critic, x, kwargs = zoo.make(name, dtype)
    twin, fake = copy.deepcopy(critic), torch.randn_like(x)
    at, options = point(kind, x, fake)
    _, wanted = plain.scores_and_penalty(twin, at, "squared" if kind == "r1" else "two_sided", **kwargs)
    got = gp.gradient_penalty(critic, x, fake, kind=kind, critic_kwargs=kwargs, **options)
    compare(got, critic, wanted, twin, exact_buffers=kind != "coupled")


@DTYPES
@pytest.mark.parametrize("name", zoo.ZOO)
def test_score_and_penalty_of_every_critic(name, dtype):
    critic, x, kwargs = zoo.make(name, dtype)
    twin = copy.deepcopy(critic)
    wanted_scores, wanted = plain.scores_and_penalty(twin, x, **kwargs)
    scores, got = gp.score_and_penalty(critic, x, kind="r1", critic_kwargs=kwargs)
    plain.assert_close([scores, got], [wanted_scores, wanted])
    compare(plain.loss(scores, got), critic, plain.loss(wanted_scores, wanted), twin)


def compare(got, critic, wanted, twin, exact_buffers=True):
    got.backward()
    wanted.backward()
    plain.assert_close([got], [wanted])
    plain.assert_close(plain.kept_gradients(critic.parameters()), plain.kept_gradients(twin.parameters()))
    for (name, a), (_, b) in zip(critic.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(a, b) if exact_buffers else torch.allclose(a, b), name
        assert "num_batches_tracked" not in name or a == 1


@DTYPES
@pytest.mark.parametrize("name", zoo.ZOO)
def test_channels_last(name, dtype):
    """A critic and images in channels_last give the parameters' gradients, and the penalty's, of contiguous ones."""
    critic, x, kwargs = zoo.make(name, dtype)
    if x.dim() not in (4, 5):
        assert name in ("mlp", "audio", "transformer")
        return
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    for joint in (False, True):
        mine, twin = copy.deepcopy(critic).to(memory_format=layout), copy.deepcopy(critic)
        wanted_scores, wanted = plain.scores_and_penalty(twin, x, **kwargs)
        at = x.contiguous(memory_format=layout)
        if joint:
            scores, got = gp.score_and_penalty(mine, at, kind="r1", critic_kwargs=kwargs)
            got, wanted = plain.loss(scores, got), plain.loss(wanted_scores, wanted)
        else:
            got = gp.gradient_penalty(mine, at, kind="r1", critic_kwargs=kwargs)
        compare(got, mine, wanted, twin, exact_buffers=False)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_gradients_to_x_by_hand(name):
    critic, x, kwargs = zoo.make(name)
    results = []
    for ours in (False, True):
        twin, x = copy.deepcopy(critic), x.detach().requires_grad_()
        with gp.fast_double_backward() if ours else plain.sdpa_kernel(plain.SDPBackend.MATH):
            scores = twin(x, **kwargs)
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
        inputs = [x, *twin.parameters()]
        by_grad = plain.gradients(penalty, inputs, retain_graph=True)
        plain.loss(scores, penalty).backward()
        results.append([*by_grad, *plain.kept_gradients(inputs)])
    plain.assert_close(results[1], results[0])


def test_hand_written_code_wholly_inside_the_block():
    critic, x, _ = zoo.make("dcgan batch")
    wanted = plain.step(copy.deepcopy(critic), x, True, ours=False)
    x.requires_grad_()
    with gp.fast_double_backward():
        scores = critic(x)
        (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        value = plain.loss(scores, 5 * grad.flatten(1).norm(dim=1).square().mean())
        value.backward()
    plain.assert_close([value.detach(), *plain.kept_gradients(critic.parameters())], wanted)


@pytest.mark.parametrize("name", CRITICS)
def test_critics_as_people_write_them(name):
    plain.assert_same_steps(CRITICS[name], X, 1e-5 if "float16" in name else None)


class Negated(torch.autograd.Function):
    """Changes its argument, where no mode can see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.neg_()

    @staticmethod
    def backward(ctx, g):
        return -g


def unrecorded(h):
    with torch.no_grad():
        h.mul_(-2)
    return h


CHANGES = {
    "h.mul_": lambda h: h.mul_(-2),
    "torch.sigmoid_": lambda h: torch.sigmoid_(h),
    "h *=": lambda h: operator.imul(h, -2),
    "h[:, 0] =": lambda h: (operator.setitem(h, (slice(None), 0), -1.0), h)[1],
    "h[h > 0] =": lambda h: (operator.setitem(h, h > 0, -1.0), h)[1],
    "a slice": lambda h: (h[:, 0].mul_(-2), h)[1],
    "a view of a view": lambda h: (h.view(-1)[3:].view(-1, 1).neg_(), h)[1],
    "a view made before": lambda h: (lambda v: (h.neg_(), v.mul_(-2), h)[2])(h.flatten(1)),
    "out of no_grad": unrecorded,
    "h.detach()": lambda h: (h.detach().mul_(-2), h)[1],
    "h.data": lambda h: (h.data.mul_(-2), h)[1],
    "h.data =": lambda h: (setattr(h, "data", -h.data), h)[1],
    "numpy": lambda h: (operator.imul(h.detach().numpy(), -1), h)[1],
    "numpy of data": lambda h: (operator.imul(h.data.numpy(), -1), h)[1],
    "numpy of a tensor with a gradient": lambda h: (operator.imul(h.numpy(force=True), -1), h)[1],
    "dlpack": lambda h: (torch.from_dlpack(h.detach()).neg_(), h)[1],
    "the storage": lambda h: (h.new_empty(0).detach().set_(h.untyped_storage()).mul_(-2), h)[1],
    "another's set_": lambda h: (torch.empty(0).set_(h.detach()).mul_(-2), h)[1],
    "another's data =": lambda h: (lambda other: (setattr(other, "data", h), other.mul_(-2), h)[2])(torch.empty(0)),
    "h.unsafe_chunk": lambda h: (h.unsafe_chunk(2, 1)[0].neg_(), h)[1],
    "h.unsafe_split": lambda h: (h.unsafe_split(2, 1)[0].neg_(), h)[1],
    "h.unsafe_split_with_sizes": lambda h: (h.unsafe_split_with_sizes([3, 1], 1)[0].neg_(), h)[1],
    "torch.unsafe_chunk": lambda h: (torch.unsafe_chunk(h, 2, 1)[1].neg_(), h)[1],
    "torch.unsafe_split": lambda h: (torch.unsafe_split(h, 2, 1)[1].neg_(), h)[1],
    "torch.unsafe_split_with_sizes": lambda h: (torch.unsafe_split_with_sizes(h, [1, 3], 1)[1].neg_(), h)[1],
    "aten.unsafe_split": lambda h: (aten.unsafe_split.Tensor(h, 2, 1)[1].neg_(), h)[1],
    "aten._unsafe_view": lambda h: (aten._unsafe_view(h, [4, 256]).mul_(-2), h)[1],
    "aten.mul_": lambda h: aten.mul_(h, -2),
    "aten.mul_.Tensor": lambda h: aten.mul_.Tensor(h, torch.tensor(-2.0)),
    "torch.relu_ by keyword": lambda h: torch.relu_(input=h),
    "h.copy_": lambda h: h.copy_(-h),
    "h.zero_": lambda h: h.zero_().add_(1),
    "foreach": lambda h: (torch._foreach_mul_([h], -2.0), h)[1],
    "foreach of two": lambda h: (torch._foreach_mul_([torch.ones(1), h], -2.0), h)[1],
    "F.elu in place": lambda h: F.elu(h, inplace=True),
    "F.elu in place, by position": lambda h: F.elu(h, 1.0, True),
    "F.hardtanh in place": lambda h: F.hardtanh(h, inplace=True),
    "F.relu in place": lambda h: F.relu(h, inplace=True),
    "F.dropout in place": lambda h: F.dropout(h, 0.5, True, True),
    "addcmul_": lambda h: h.addcmul_(h, h),
    "lerp_ of another": lambda h: torch.ones_like(h).lerp_(h, 0.5),
    "index_add_": lambda h: h.index_add_(0, torch.tensor([0, 1]), -h[:2] * 3),
    "scatter_": lambda h: h.scatter_(1, torch.zeros(4, 1, 8, 8, dtype=torch.long), -1.0),
    "masked_fill_": lambda h: h.masked_fill_(h > 0, -1.0),
    "a Function": Negated.apply,
}
ACTIVATIONS = {
    "leaky_relu": lambda h: F.leaky_relu(h, 0.2),
    "hardtanh": F.hardtanh,
    "group norm and leaky_relu": lambda h: F.leaky_relu(F.group_norm(h, 2), 0.2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_changes_of_an_activations_result(name, change):
    """Which torch allows where it keeps the argument for the backward."""

    def forward(self, x):
        h = CHANGES[change](ACTIVATIONS[name](self.first(x)))
        return self.head(F.softplus(self.second(h)).mean((2, 3)))

    plain.assert_same_steps(lambda: net(forward), X)


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(4)], ids=str)
def test_in_place_on_pools_of_signals(pool):
    def make():
        return nn.Sequential(nn.Conv1d(3, 4, 3), pool, nn.ReLU(True), nn.Conv1d(4, 1, 2), nn.AdaptiveAvgPool1d(1))

    plain.assert_same_steps(make, X[:, :, 0].repeat(1, 1, 2)[..., :10])


def test_functional_call_and_closures():
    critic = body(nn.BatchNorm2d(4))
    wanted = plain.step(copy.deepcopy(critic), X, False, ours=False)[1:]
    values = {name: p.detach().clone().requires_grad_() for name, p in critic.named_parameters()}

    def closure(x):
        return torch.func.functional_call(critic, values, (x,))

    got = plain.gradients(gp.gradient_penalty(closure, X, kind="r1"), list(values.values()))
    plain.assert_close(got, wanted)
    assert all(p.grad is None for p in critic.parameters())


def test_parameters_cached_over_scores_of_fakes_and_penalty():
    results = []
    for ours in (False, True):
        torch.manual_seed(1)
        critic = nn.Sequential(*(parametrizations.spectral_norm(m) for m in (conv(), conv(4, 4), nn.Linear(8, 1))))
        with parametrize.cached():
            fakes = critic(X.flip(0))
            scores, penalty = (gp.score_and_penalty if ours else plain.scores_and_penalty)(
                lambda x: critic(x).mean((1, 2, 3)),  # noqa: B023
                X,
            )
        (fakes.mean() - plain.loss(scores, penalty)).backward()
        results.append(plain.kept_gradients(critic.parameters()))
    plain.assert_close(results[1], results[0])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norm", ["none", "batch", "spectral"])
def test_value_alone(context, norm):
    critic, x, _ = zoo.make(f"dcgan {norm}")
    critic.eval()
    _, wanted = plain.scores_and_penalty(critic, x)
    with context():
        got = gp.gradient_penalty(critic, x, kind="r1")
        scores, penalty = gp.score_and_penalty(critic, x)
        with gp.fast_double_backward():
            torch.testing.assert_close(critic(x), scores)
    assert not got.requires_grad
    assert not scores.requires_grad
    plain.assert_close([got, penalty], [wanted.detach()] * 2)


def test_anomaly_mode_and_repeated_steps():
    critic = zoo.dcgan("batch")
    x = torch.randn(4, 3, 16, 16)
    with torch.autograd.detect_anomaly(check_nan=True):
        plain.assert_same_as_plain(critic, x)
    optimizer = torch.optim.Adam(critic.parameters())
    twin = copy.deepcopy(critic)
    other = torch.optim.Adam(twin.parameters())
    for _ in range(3):
        for model, optim, ours in ((critic, optimizer, True), (twin, other, False)):
            optim.zero_grad()
            plain.step(model, x, True, ours)
            optim.step()
    for a, b in zip(critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
