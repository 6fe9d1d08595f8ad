"""score_and_penalty's one backward: every way of using it, critics whose samples meet, and hooks."""

import copy

import plain
import pytest
import torch
import torch.nn.functional as F
import zoo
from habits import X
from plain import Net, float64_on_one_thread  # noqa: F401
from torch import nn

import gpkernels as gp


def dense(call, **modules):
    """A critic of (4, 4) features h, for call(self, h)."""
    modules = {"stem": nn.Linear(192, 4), "head": nn.Linear(4, 1), "other": nn.Linear(4, 1), **modules}
    return Net(lambda self, x: call(self, F.leaky_relu(self.stem(x.flatten(1)), 0.2)), **modules)


MEETING = {
    "flip": lambda: dense(lambda self, h: self.head(h + h.flip(0))),
    "roll": lambda: dense(lambda self, h: self.head(h + h.roll(1, 0))),
    "roll of everything": lambda: dense(lambda self, h: self.head(h + h.roll(1))),
    "shift by padding": lambda: dense(lambda self, h: self.head(h + F.pad(h, (0, 0, 1, -1)))),
    "index": lambda: dense(lambda self, h: self.head(h + h[torch.tensor([1, 2, 3, 0])])),
    "index_select": lambda: dense(lambda self, h: self.head(h + h.index_select(0, torch.tensor([1, 2, 3, 0])))),
    "slices": lambda: dense(lambda self, h: self.head(h + torch.cat([h[1:], h[:1]]))),
    "unbind": lambda: dense(lambda self, h: self.head(torch.stack(h.unbind(0)[::-1]))),
    "transpose": lambda: dense(lambda self, h: self.head(h + h.mT)),
    "permute": lambda: dense(lambda self, h: self.head(h + h.permute(1, 0))),
    "swap to the back": lambda: dense(lambda self, h: self.head(h.view(4, 2, 2).movedim(0, -1).reshape(4, 4))),
    "mean": lambda: dense(lambda self, h: self.head(F.relu(h - h.mean(0)))),
    "sum kept": lambda: dense(lambda self, h: self.head(h - h.sum(0, keepdim=True))),
    "sum of negative dim": lambda: dense(lambda self, h: self.head(h - h.sum(-2))),
    "sum of a product": lambda: dense(lambda self, h: self.head(h - (h @ h.mT).mean(1, keepdim=True))),
    "matmul with a constant": lambda: dense(lambda self, h: self.head(torch.ones(4, 4).tril() @ h)),
    "std": lambda: dense(lambda self, h: self.head(h * h.std(0).mean())),
    "cumsum": lambda: dense(lambda self, h: self.head(h.cumsum(0))),
    "(B, B) and (B,)": lambda: dense(lambda self, h: (h + self.head(h).view(-1)).mean(1)),
    "(B, B) times (B,)": lambda: dense(lambda self, h: (h.detach() * self.head(h).view(-1)).mean(1)),
    "(B, 1) and (B,)": lambda: dense(lambda self, h: (self.head(h) + self.other(h).view(-1)).mean(1)),
    "(B, B) where (B,)": lambda: dense(lambda self, h: torch.where(h > 0, h, self.head(h).view(-1)).mean(1)),
    "(B, B) over (B,)": lambda: dense(lambda self, h: (h - self.other(h).squeeze(1)).sum(1)),
    "(1, B) and (B, B)": lambda: dense(lambda self, h: (h + self.head(h).view(1, -1)).mean(1)),
    "folded batch": lambda: dense(lambda self, h: self.head(h.view(2, 2, 4).flip(0).reshape(4, 4))),
    "folded pairs": lambda: dense(
        lambda self, h: self.head(F.linear(h.view(2, 8), self.pair.weight).view(4, 4)), pair=nn.Linear(8, 8)
    ),
    "batch as channels": lambda: Net(
        lambda self, x: self.head(F.relu(self.mix(x.flatten(2).permute(1, 0, 2)).permute(1, 0, 2)).mean(2)),
        mix=nn.Conv1d(4, 4, 1),
        head=nn.Linear(3, 1),
    ),
    "batch as pixels": lambda: dense(
        lambda self, h: self.head(F.relu(self.mix(h.T[None]))[0].T), mix=nn.Conv1d(4, 4, 3, padding=1)
    ),
    "batch pooled": lambda: dense(lambda self, h: self.head(F.avg_pool1d(h.T[None], 3, 1, 1)[0].T)),
    "batch pooled, square": lambda: dense(lambda self, h: self.head(F.max_pool1d(h.T.unsqueeze(1), 3, 1, 1)[:, 0].T)),
    "interpolated batch": lambda: dense(
        lambda self, h: self.head(F.interpolate(h.T[None], size=8, mode="linear")[0].T[::2])
    ),
    "linear over the batch": lambda: dense(lambda self, h: F.linear(h.T, torch.ones(4, 4).tril()).T.sum(1)),
    "batch norm": lambda: dense(lambda self, h: self.head(F.relu(self.norm(h))), norm=nn.BatchNorm1d(4)),
    "softmax over the batch": lambda: dense(lambda self, h: self.head(h.softmax(0) * h)),
    "as_strided": lambda: dense(lambda self, h: self.head(h.as_strided((4, 4), (1, 4)))),
    "sorted": lambda: dense(lambda self, h: self.head(h + 2 * h.sort(0).values)),
    "scores of (B, B)": lambda: dense(lambda self, h: h),
    "copied": lambda: dense(lambda self, h: self.head(torch.zeros(4, 4).copy_(h.flip(0)))),
    "written in place": lambda: dense(lambda self, h: self.head(swapped(h.clone()))),
}


def swapped(h):
    h[0] = h[1] * 2
    return h


FLAT = {
    "linear": lambda: dense(lambda self, h: self.head(h)),
    "flattened scores": lambda: dense(lambda self, h: self.head(h).view(-1)),
    "squeezed scores": lambda: dense(lambda self, h: self.head(h).squeeze(1)),
    "selected scores": lambda: dense(lambda self, h: self.head(h)[:, 0]),
    "mean of features": lambda: dense(lambda self, h: h.mean(1) + h.sum(-1)),
    "scaled": lambda: dense(lambda self, h: self.head(-h * 0.7 / 3) - 1),
    "a bias added by hand": lambda: dense(lambda self, h: self.head(h + self.other.weight)),
    "a scale": lambda: dense(lambda self, h: self.head(h * self.other.weight.exp())),
    "a quotient": lambda: dense(lambda self, h: self.head(h / (2 + self.other.weight.square()))),
    "prelu": lambda: dense(lambda self, h: self.head(self.act(h - 0.1)), act=nn.PReLU(4)),
    "a skip": lambda: dense(lambda self, h: self.head(h + F.relu(self.again(h))), again=nn.Linear(4, 4)),
    "a layer used twice": lambda: dense(
        lambda self, h: self.head(self.again(F.relu(self.again(h)))), again=nn.Linear(4, 4)
    ),
    "concatenated constants": lambda: dense(
        lambda self, h: self.head(torch.cat([h[:, :2], self.other(torch.ones(4, 2, 4)).squeeze(2)], 1))
    ),
    "images": lambda: zoo.dcgan(size=8),
    "spectral norm": lambda: zoo.dcgan("spectral", size=8),
    "residual": lambda: nn.Sequential(
        zoo.Block(3, 4, 8, first=True), zoo.Block(4, 4, 4), nn.Flatten(), nn.Linear(16, 1)
    ),
}


@pytest.mark.parametrize("name", MEETING)
def test_samples_that_meet(name):
    plain.assert_same_steps(MEETING[name], X)


@pytest.mark.parametrize("name", FLAT)
def test_flat_critics_share(name):
    _, penalty = gp.score_and_penalty(FLAT[name](), X)
    assert "Shared" in penalty.grad_fn.name()
    plain.assert_same_steps(FLAT[name], X)


def pair(make, x=X):
    """(critic, scores, penalty) of the package and of plain autograd."""
    for run in (gp.score_and_penalty, plain.scores_and_penalty):
        torch.manual_seed(1)
        critic = make()
        yield critic, *run(critic, x)


def other_parameters():
    return dense(lambda self, h: self.head(self.act(h * self.other.weight.exp() - 0.1)), act=nn.PReLU(4))


MAKERS = {"flat": lambda: zoo.dcgan(size=8), "others": other_parameters, "batch norm": MEETING["batch norm"]}
MAKE = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

USES = {
    "scores": lambda scores, penalty: scores.square().sum(),
    "penalty": lambda scores, penalty: penalty.square(),
    "both": lambda scores, penalty: F.softplus(-scores).mean() + penalty,
    "a product": lambda scores, penalty: scores.mean() * penalty,
    "scores twice": lambda scores, penalty: scores.mean() + scores.square().sum() + penalty,
    "zero seeds": lambda scores, penalty: 0 * scores.sum() + penalty,
    "zero seed of the penalty": lambda scores, penalty: scores.sum() + 0 * penalty,
    "a seed a sample": lambda scores, penalty: (scores.flatten() * torch.arange(-1.0, 3.0)).sum() + penalty,
    "one sample": lambda scores, penalty: scores[1].sum() + penalty,
    "a weighted penalty": lambda scores, penalty: scores.sum() - 3e-7 * penalty,
    "scores in place": lambda scores, penalty: scores.mul_(2).sum() + penalty,
}


@MAKE
@pytest.mark.parametrize("use", USES)
def test_every_use_of_the_two(make, use):
    results = []
    for critic, scores, penalty in pair(make):
        USES[use](scores, penalty).backward()
        results.append(plain.kept_gradients(critic.parameters()))
    plain.assert_close(*results)


@MAKE
def test_retained_graph_runs_again_and_again(make):
    results = []
    for critic, scores, penalty in pair(make):
        for _ in range(2):
            plain.loss(scores, penalty).backward(retain_graph=True)
        penalty.backward(retain_graph=True)
        scores.sum().backward(retain_graph=True)
        scores.sum().backward()
        results.append(plain.kept_gradients(critic.parameters()))
    plain.assert_close(*results)


@MAKE
def test_without_a_retained_graph_the_second_backward_raises(make):
    for _, scores, penalty in pair(make):
        plain.loss(scores, penalty).backward()
        with pytest.raises(RuntimeError, match=r"second time|retain_graph"):
            plain.loss(scores, penalty).backward()


@pytest.mark.parametrize(
    "make", [MAKERS["flat"], other_parameters, lambda: zoo.dcgan("group", size=16)], ids=["flat", "others", "group"]
)
def test_derivative_of_a_function_of_the_parameter_gradients(make):
    """Of group norm, since torch's third derivative of batch norm and layer norm is wrong (pytorch issue 186256)."""
    results = []
    for critic, scores, penalty in pair(make, X.repeat(1, 1, 2, 2) if make not in MAKERS.values() else X):
        parameters = list(critic.parameters())
        seed = torch.linspace(0.5, 1.5, 4).requires_grad_()
        value = (scores.flatten() * seed).sum() + plain.loss(scores, penalty)
        first = plain.gradients(value, parameters, create_graph=True)
        second = plain.gradients(sum(g.square().sum() for g in first), [*parameters, seed])
        results.append([*first, *second])
    plain.assert_close(*results)


@MAKE
def test_gradients_accumulate_over_calls(make):
    results = []
    for run in (gp.score_and_penalty, plain.scores_and_penalty):
        torch.manual_seed(1)
        critic = make()
        first, second = run(critic, X), run(critic, X.flip(1))
        plain.loss(*first).backward()
        (plain.loss(*second) + critic(X).sum()).backward()
        results.append(plain.kept_gradients(critic.parameters()))
    plain.assert_close(*results)


@MAKE
def test_two_pairs_in_one_backward_and_gradients_of_some(make):
    results = []
    for run in (gp.score_and_penalty, plain.scores_and_penalty):
        torch.manual_seed(1)
        critic = make()
        value = plain.loss(*run(critic, X)) + plain.loss(*run(critic, X.flip(1)))
        results.append(plain.gradients(value, list(critic.parameters())[:1]))
    plain.assert_close(*results)


@pytest.mark.parametrize("name", ["flat", "others"])
def test_microbatches(name):
    results = []
    for run, options in ((gp.score_and_penalty, {"microbatch": 3}), (plain.scores_and_penalty, {})):
        torch.manual_seed(1)
        critic = MAKERS[name]()
        plain.loss(*run(critic, X, **options)).backward()
        results.append(plain.kept_gradients(critic.parameters()))
    plain.assert_close(*results)


@pytest.mark.parametrize("make", [name for name in MAKERS if name != "batch norm"] + ["patches"])
def test_one_sample_and_patches(make):
    results = []
    for run in (gp.score_and_penalty, plain.scores_and_penalty):
        torch.manual_seed(1)
        if make == "patches":
            critic, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)), X
        else:
            critic, x = MAKERS[make](), X[:1]
        plain.loss(*run(critic, x)).backward()
        results.append(plain.kept_gradients(critic.parameters()))
    plain.assert_close(*results)


def test_in_place_changes_of_a_bias_and_of_weights_before_the_backward():
    """Plain autograd needs no bias in a backward, and says so where a weight it needs has changed."""
    for name in ("bias", "weight"):
        results = []
        for critic, scores, penalty in pair(lambda: zoo.dcgan(size=8)):
            with torch.no_grad():
                getattr(critic[-1], name).add_(1)
            value = plain.loss(scores, penalty)
            results.append(plain.outcome(lambda v=value, c=critic: plain.gradients(v, list(c.parameters()))))
        plain.assert_same_outcome(*results)


def test_pairs_survive_a_copy_of_the_critic():
    critic = zoo.dcgan(size=8)
    scores, penalty = gp.score_and_penalty(critic, X)
    twin = copy.deepcopy(critic)
    plain.loss(scores, penalty).backward()
    assert all(p.grad is None for p in twin.parameters())


class Clamped(torch.autograd.Function):
    """A backward that is not linear: what comes in two parts comes out another."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.05, 0.05)


def conditional(elsewhere=None):
    """A critic of (x, c); or of x alone, which finds c elsewhere."""
    critic = dense(lambda self, h: self.head(h * self.condition[1] + self.condition[0]))
    critic.condition = elsewhere

    def call(x, first, second):
        critic.condition = (first, second) if elsewhere is None else elsewhere
        return critic(x)

    return critic, call


def normed(c):
    c.register_hook(lambda g: g / g.norm())
    return c


OUTSIDE = {
    "computed": lambda p: p * 2,
    "hooked": lambda p: normed(p * 2),
    "of a Function": lambda p: Clamped.apply(p),
    "that keeps its gradient": lambda p: kept(p * 2),
    "a leaf": lambda p: p,
}


def kept(c):
    c.retain_grad()
    return c


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("way", ["argument", "keyword", "in a list", "closure"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_tensors_from_outside_the_critic(name, way, when, elsewhere):
    """Autograd goes once through what lies behind them, with all of their gradient, and can give it to the caller."""
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        p = torch.randn(4, 4).requires_grad_()
        c = OUTSIDE[name](p) if when == "before" else p * 2
        critic, call = conditional((c, c) if way == "closure" else None)
        options = {
            "argument": {"critic_args": (c, c)},
            "keyword": {"critic_kwargs": {"first": c, "second": c}},
            "in a list": {"critic_args": ([c, c],)},
            "closure": {"critic_args": (None, None)},
        }[way]
        if way == "in a list":
            call = lambda x, pair, call=call: call(x, *pair)  # noqa: E731
        if ours:
            scores, penalty = gp.score_and_penalty(call, X, **options)
            merged = way in ("argument", "keyword") or (name == "a leaf" and when == "before")
            assert ("Shared" in penalty.grad_fn.name()) == merged
        else:
            plainly = lambda x, o=options, f=call: f(x, *o.get("critic_args", ()), **o.get("critic_kwargs", {}))  # noqa: E731
            scores, penalty = plain.scores_and_penalty(plainly, X)
        if when == "after" and name in ("hooked", "that keeps its gradient"):
            normed(c) if name == "hooked" else kept(c)
        value = plain.loss(scores, penalty) + (c.cos().sum() if elsewhere else 0)
        found = plain.gradients(value, [c, *critic.parameters()], retain_graph=True)
        value.backward()
        results.append([*found, *plain.kept_gradients([p, *critic.parameters()])])
        if c.retains_grad:
            results[-1].append(c.grad)
    plain.assert_close(*results)


@pytest.mark.parametrize("both", [False, True])
def test_a_weight_behind_another(both):
    """The critic uses a parameter and what is computed from it."""
    results = []
    for ours in (True, False):
        torch.manual_seed(1)
        p = torch.randn(4).requires_grad_()
        critic = dense(lambda self, h, p=p: self.head(h * self.condition) + (p.sum() if both else 0))

        def call(x, c, critic=critic):
            critic.condition = c
            return critic(x)

        args = (p.exp(),)
        if ours:
            pair = gp.score_and_penalty(call, X, critic_args=args)
        else:
            pair = plain.scores_and_penalty(lambda x, call=call, args=args: call(x, *args), X)
        plain.loss(*pair).backward()
        results.append(plain.kept_gradients([p, *critic.parameters()]))
    plain.assert_close(*results)


def test_functions_inside_the_critic_that_are_not_linear():
    plain.assert_same_steps(lambda: dense(lambda self, h: self.head(h * Clamped.apply(self.other.weight))), X)


def test_what_the_critic_shares_with_the_rest_of_the_loss():
    """The merged backward leaves a graph that others go through too."""
    results = []
    for ours in (False, True):
        torch.manual_seed(1)
        p = torch.randn(4).requires_grad_()
        scale = p.exp()
        critic = dense(lambda self, h, scale=scale: self.head(h * scale))
        scores, penalty = gp.score_and_penalty(critic, X) if ours else plain.scores_and_penalty(critic, X)
        (scores.mean() + penalty + scale.square().sum()).backward()
        results.append(plain.kept_gradients([p, *critic.parameters()]))
    plain.assert_close(*results)
