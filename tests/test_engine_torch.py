"""The second-order engine beside the rest of torch: autocast, scalers, half precision, torch.compile."""

import copy
import warnings

import plain
import pytest
import torch
import torch.nn.functional as F
import zoo
from plain import Net, float64_on_one_thread  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gpkernels as gp
from gpkernels import double_backward


def whole(gradients):
    return torch.cat([g.flatten().double() for g in gradients])


def relative(got, wanted):
    got, wanted = whole(got), whole(wanted)
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n not in ("stylegan2",)])
def test_autocast(name):
    """As near to plain autograd under autocast as that is to itself."""
    results = []
    for run in ("plain", "penalty", "joint"):
        critic, x, kwargs = zoo.make(name, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            if run == "plain":
                scores, penalty = plain.scores_and_penalty(critic, x, **kwargs)
            elif run == "joint":
                scores, penalty = gp.score_and_penalty(critic, x, critic_kwargs=kwargs)
            else:
                penalty = gp.gradient_penalty(critic, x, kind="r1", critic_kwargs=kwargs)
        if run != "plain":
            assert penalty.dtype == torch.float32
        parameters = list(critic.parameters())
        alone = plain.gradients(penalty, parameters, retain_graph=True)
        if run != "penalty":
            (scores.float().square().sum() + penalty).backward()
        results.append((scores.dtype, alone, plain.kept_gradients(parameters)))
    wanted, penalty, joint = results
    assert joint[0] == wanted[0]
    assert relative(penalty[1], wanted[1]) < 0.05
    assert relative(joint[1], wanted[1]) < 0.05
    assert relative(joint[2], wanted[2]) < 0.05


def test_autocast_of_a_critic_that_casts_itself():
    def autocasting(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = F.leaky_relu(self.first(x), 0.2)
        with torch.autocast("cpu", enabled=False):
            return self.head(h.float().mean((2, 3)))

    critic = Net(autocasting, first=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 1)).float()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float32)
    results = [plain.step(copy.deepcopy(critic), x, both, ours) for both in (False, True) for ours in (False, True)]
    assert relative(results[1], results[0]) < 0.02
    assert relative(results[3], results[2]) < 0.02


@pytest.mark.parametrize("name", ["dcgan none", "dcgan batch", "dcgan spectral", "sngan projection", "audio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grad_scaler(name, dtype):
    """Of a power of two, which changes nothing but exponents."""
    results = []
    for ours in (False, True):
        critic, x, kwargs = zoo.make(name, dtype)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        if ours:
            scores, penalty = gp.score_and_penalty(critic, x, critic_kwargs=kwargs, scaler=scaler)
            penalty = penalty + gp.gradient_penalty(critic, x, kind="r1", critic_kwargs=kwargs, scaler=scaler)
        else:
            scores, penalty = plain.scores_and_penalty(critic, x, **kwargs)
            penalty = penalty + plain.scores_and_penalty(critic, x, **kwargs)[1]
        optimizer = torch.optim.SGD(critic.parameters())
        scaler.scale(plain.loss(scores, penalty)).backward()
        scaler.unscale_(optimizer)
        results.append(plain.kept_gradients(critic.parameters()))
    plain.assert_close(*reversed(results))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group"])
def test_critics_of_half_precision(dtype, norm):
    """Against float64 from the same weights, no worse than plain autograd in that precision by much."""
    critic, x, _ = zoo.make(f"dcgan {norm}", dtype)
    x = x.double().to(dtype)
    wanted = plain.step(copy.deepcopy(critic).double(), x.double(), True, ours=False)[1:]
    errors = []
    for ours in (False, True):
        twin = copy.deepcopy(critic)
        scores, penalty = (gp.score_and_penalty if ours else plain.scores_and_penalty)(twin, x)
        assert scores.dtype == dtype
        plain.loss(scores.float(), penalty.float()).backward()
        assert all(p.grad.dtype == dtype for p in twin.parameters() if p.grad is not None)
        errors.append(relative(plain.kept_gradients(twin.parameters()), wanted))
    assert errors[1] < max(1.5 * errors[0], 1e-2)


@pytest.fixture(autouse=True)
def no_compiled_code_left():
    yield
    torch.compiler.reset()


def small_critic():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1)
    )


def compiled(how):
    """(what is called, the module behind it)."""
    critic = small_critic()
    if how == "compiled critic":
        return torch.compile(critic, backend="aot_eager"), critic
    if how == "module.compile()":
        critic.compile(backend="aot_eager")
        return critic, critic
    if how == "submodule":
        return nn.Sequential(torch.compile(critic[:3], backend="aot_eager"), *critic[3:]), critic
    if how == "submodule.compile()":
        critic[0].compile(backend="aot_eager")
        return critic, critic
    function = torch.compile(lambda x: critic[:3](x), backend="aot_eager")
    if how == "function":
        return torch.compile(lambda x: critic(x), backend="aot_eager"), critic
    return lambda x: critic[3:](function(x)), critic


WAYS = ("compiled critic", "module.compile()", "submodule", "submodule.compile()", "function", "closure")


@pytest.mark.parametrize("warm", [False, True], ids=["", "warm"])
@pytest.mark.parametrize("how", WAYS)
def test_compiled_critics(how, warm):
    x = torch.randn(4, 3, 8, 8)
    wanted = [plain.step(small_critic(), x, both, ours=False) for both in (False, True)]
    for both in (False, True):
        call, critic = compiled(how)
        if warm:
            call(x).sum().backward()
            critic.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(2):
                critic.zero_grad()
                if both:
                    scores, penalty = gp.score_and_penalty(call, x)
                    value = plain.loss(scores, penalty)
                else:
                    value = gp.gradient_penalty(call, x, kind="r1")
                value.backward()
        plain.assert_close([value.detach(), *plain.kept_gradients(critic.parameters())], wanted[both])
        ours = [w for w in caught if "the penalty runs its uncompiled original" in str(w.message)]
        assert len(ours) == (how != "closure")
        assert all(w.filename == __file__ for w in ours)
        torch.testing.assert_close(call(x), critic(x))  # which is compiled again


def test_a_penalty_inside_a_compiled_function():
    critic, x = small_critic(), torch.randn(4, 3, 8, 8)
    wanted = plain.step(small_critic(), x, False, ours=False)

    for run in (gp.gradient_penalty, lambda *args, **options: gp.score_and_penalty(*args, **options)[1]):
        critic.zero_grad()

        def step(x, run=run):
            return run(critic, 2 * x - x, kind="r1") * 1

        value = torch.compile(step, backend="eager")(x)
        value.backward()
        plain.assert_close([value.detach(), *plain.kept_gradients(critic.parameters())], wanted)
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="call it outside the compiled function"):
            torch.compile(step, backend="eager", fullgraph=True)(x)


def test_attention_has_a_second_derivative_whatever_the_size(monkeypatch):
    """Also where the critic is so small that nothing else is rerouted, and under checkpoints."""
    monkeypatch.setattr(double_backward.mode, "SMALL", 2**21)
    critic, x, _ = zoo.make("transformer")
    plain.assert_same_as_plain(critic, x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.critic = critic

        def forward(self, x):
            return checkpoint(self.critic, x, use_reentrant=False)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain.assert_same_as_plain(Checkpointed(), x)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_critics_too_small_to_reroute(name, monkeypatch):
    monkeypatch.setattr(double_backward.mode, "SMALL", 2**40)
    critic, x, kwargs = zoo.make(name)
    wanted = plain.step(copy.deepcopy(Labelled(critic, kwargs)), x, True, ours=False)
    plain.assert_close(plain.step(Labelled(critic, kwargs), x, True, ours=True), wanted)


def counted_by_torch(critic, x):
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        critic(x)
    return flops.get_total_flops() // 2


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: zoo.dcgan("none", size=64), (3, 64, 64)),
        (lambda: zoo.dcgan("spectral", size=64), (3, 64, 64)),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 1)), (3, 8, 8)),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 5, 2, 2), nn.AvgPool1d(4), nn.Conv1d(8, 4, 3, 1, 1)), (3, 64)),
        (lambda: nn.Sequential(nn.Conv3d(1, 4, 3, 1, 1), nn.MaxPool3d(2), nn.Conv3d(4, 4, 3, 1, 1)), (1, 8, 8, 8)),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Conv2d(3, 2, 1)),
            (3, 16, 16),
        ),
    ],
)
def test_a_critic_is_as_large_as_its_multiplications(make, shape, monkeypatch):
    """Up to the parameters that multiply nothing, and what padding leaves out."""
    critic, x = make(), torch.randn(4, *shape)
    wanted = counted_by_torch(critic, x)
    for small, large in ((0.8, True), (1.2, False)):
        monkeypatch.setattr(double_backward.mode, "SMALL", small * wanted)
        assert double_backward.pays(critic, x) == large


def test_a_critic_with_norms_must_be_larger(monkeypatch):
    x = torch.randn(4, 3, 64, 64)
    size = counted_by_torch(zoo.dcgan("none", size=64), x)
    for norm, times, pays in (("none", 0.8, True), ("batch", 0.8, False), ("layer", 0.8, False), ("batch", 0.1, True)):
        monkeypatch.setattr(double_backward.mode, "SMALL", times * size)
        assert double_backward.pays(zoo.dcgan(norm, size=64), x) == pays


def test_a_critic_whose_size_is_not_plain_to_see_is_rerouted(monkeypatch):
    monkeypatch.setattr(double_backward.mode, "SMALL", 2**40)
    assert double_backward.pays(lambda x: x.sum(1), torch.ones(2, 3))
    assert double_backward.pays(nn.LazyLinear(1), torch.ones(2, 3))


def test_lazy_critics_whose_size_is_not_known_yet(monkeypatch):
    monkeypatch.setattr(double_backward.mode, "SMALL", 2**21)

    def make():
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.LazyLinear(1))

    plain.assert_same_steps(make, torch.randn(4, 3, 8, 8))


class Labelled(nn.Module):
    def __init__(self, critic, kwargs):
        super().__init__()
        self.critic, self.kwargs = critic, kwargs

    def forward(self, x):
        return self.critic(x, **self.kwargs)


AUTOCAST = {
    "batch_norm": lambda x, w: F.batch_norm(x, None, None, w, w, True),
    "instance_norm": lambda x, w: F.instance_norm(x, weight=w, bias=w),
    "layer_norm": lambda x, w: F.layer_norm(x, (5,), w[:1].expand(5), w[1:2].expand(5)),
    "group_norm": lambda x, w: F.group_norm(x, 2, w, w),
    "silu": lambda x, w: F.silu(x),
    "gelu": lambda x, w: F.gelu(x),
    "tanh": lambda x, w: x.tanh(),
    "softplus": lambda x, w: F.softplus(x),
    "conv1d": lambda x, w: F.conv1d(x, w[:, None, None].expand(4, 4, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_of_a_row(name, dtype, device):
    """torch's own choice of dtype, at the caller's and for what autocast hands on."""
    torch.manual_seed(1)
    x, w = torch.randn(6, 4, 5, dtype=dtype, device=device), torch.randn(4, dtype=torch.float32, device=device)
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    results, made_of = [], []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        with torch.autocast(device, low), block:
            y = AUTOCAST[name](leaves[0] * 1, leaves[1])
        made_of.append(y.grad_fn.name())
        first = plain.gradients(y.float().sin().sum(), leaves, create_graph=True)
        second = plain.gradients(sum(g.float().sin().sum() for g in first), leaves)
        results.append([y.detach(), *first, *second])
    wanted, got = results
    assert [t.dtype for t in got] == [t.dtype for t in wanted]
    assert made_of[0] != made_of[1] or (device == "cuda" and name == "instance_norm")
    assert relative(got, wanted) < (1e-4 if dtype == torch.float32 and name != "conv1d" else 0.05)
