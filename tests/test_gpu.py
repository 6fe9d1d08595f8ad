"""What only a GPU can show: CUDA graphs that draw anew, streams, more than 2^31 elements. Skipped without one."""

import oracles
import pytest
import torch
import zoo

import gpkernels as gp
from gpkernels import registry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

BACKENDS = [name for name in ("triton", "cuda") if torch.cuda.is_available() and registry.why_not(name) is None]


@pytest.fixture(params=BACKENDS or ["none"])
def kernels(request):
    with gp.backend(request.param):
        yield request.param


def captured(run):
    """`run` in a CUDA graph: (graph, its result)."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@pytest.mark.parametrize(
    "call",
    [
        lambda x: gp.interpolate(x, -x),
        lambda x: gp.interpolate(x, -x, per_element=True),
        lambda x: gp.perturb(x, scale=0.5, relative=True),
    ],
    ids=["per_sample", "per_element", "perturb"],
)
def test_each_replay_draws_fresh_numbers(kernels, call):
    x = torch.randn(8, 3, 16, 16, device="cuda")
    graph, out = captured(lambda: call(x))
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(out.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_penalty_and_its_backward_are_captured(kernels):
    grad = torch.randn(8, 3, 16, 16, device="cuda", requires_grad=True)

    def run():
        value = gp.grad_norm_penalty(grad)
        return value, *torch.autograd.grad(value, grad)

    graph, (value, first) = captured(run)
    with torch.no_grad():
        grad.mul_(0.5)
    graph.replay()
    exact = grad.detach().double().requires_grad_()
    wanted = oracles.penalty(exact, "two_sided", 1.0, "l2", "sample", "mean")
    assert oracles.relative_error(value, wanted) < 1e-5
    assert oracles.relative_error(first, torch.autograd.grad(wanted, exact)[0]) < 1e-5


def test_pairwise_cost_and_its_backward_are_captured(kernels):
    real, fake = torch.randn(2, 8, 3, 64, 64, device="cuda")
    losses = [torch.randn(8, device="cuda", requires_grad=True) for _ in range(2)]

    def run():
        cost, delta = gp.pairwise_cost(real, fake, *losses, margin=1e-4, slope=-0.5)
        return cost, delta, *torch.autograd.grad(cost.mean(), losses)

    graph, got = captured(run)
    real.mul_(0.5)
    graph.replay()
    delta = 1e-4 * (real - fake).double().abs().sum((1, 2, 3))
    a = delta + losses[0] - losses[1]
    cost = torch.maximum(a, -0.5 * a)
    for value, wanted in zip(got, (cost, delta, *torch.autograd.grad(cost.mean(), losses)), strict=True):
        assert oracles.relative_error(value, wanted) < 1e-5


def test_runs_on_the_current_stream(kernels):
    x = torch.zeros(64, 3, 256, 256, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        out = gp.grad_norm(x)
    side.synchronize()
    torch.testing.assert_close(out, torch.full_like(out, (3 * 256 * 256) ** 0.5))


def test_more_than_two_to_the_31_elements(kernels):
    """Offsets beyond 32 bits: the last sample is treated as the first."""
    batch, length = 2, 2**30 + 64
    if torch.cuda.mem_get_info()[0] < 5 * batch * length * 2:
        pytest.skip("too little GPU memory for 2^31 half-precision elements")
    real = torch.ones(batch, length, dtype=torch.float16, device="cuda")
    real[:, -1] = 3
    out = gp.interpolate(real, torch.zeros_like(real), eps=torch.tensor([0.5, 0.25], device="cuda"))
    assert out[:, -1].tolist() == [1.5, 0.75]
    assert (out[1, :-1] == 0.25).all()
    del out
    losses = torch.zeros(batch, device="cuda")
    cost, delta = gp.pairwise_cost(real, real.roll(1, 1), losses, losses, margin=0.25)
    assert cost.tolist() == delta.tolist() == [1.0, 1.0]  # two places differ, by 2
    norms = gp.grad_norm(real, norm="linf")
    assert norms.tolist() == [3.0, 3.0]
    torch.testing.assert_close(
        gp.grad_norm(real, norm="l1"), torch.full((2,), float(length + 2), device="cuda"), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_fullgraph_on_the_device(kernels, dtype):
    x = torch.randn(4, 3, 8, 8, device="cuda", dtype=dtype, requires_grad=True)

    def epilogue(x):
        return gp.grad_norm_penalty(x)

    compiled = torch.compile(epilogue, fullgraph=True)
    results = [(f(x), *torch.autograd.grad(f(x), x)) for f in (epilogue, compiled)]
    torch.testing.assert_close(*results)


def critic_step(critic, optimizer):
    def step(real, fake):
        optimizer.zero_grad(set_to_none=True)
        scores, r1 = gp.score_and_penalty(critic, real, kind="r1")
        loss = (critic(fake) - scores).mean() + r1 + gp.gradient_penalty(critic, real, fake)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_a_graphed_critic_step_is_the_step(kernels, norm):
    """n calls are n steps: same losses and weights as without a graph, up to rounding, with the same random numbers."""
    critics = [zoo.dcgan(norm).cuda() for _ in range(2)]
    critics[1].load_state_dict(critics[0].state_dict())
    batches = [[torch.randn(8, 3, 16, 16, device="cuda") for _ in range(2)] for _ in range(6)]
    losses = []
    for critic, wrap in zip(critics, (lambda step: step, lambda step: gp.graphed(step, warmup=2)), strict=True):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, capturable=True)
        step = wrap(critic_step(critic, optimizer))
        losses.append([step(*batch).item() for batch in batches])
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=1e-4)
    for a, b in zip(*(c.parameters() for c in critics), strict=True):
        assert oracles.relative_error(a.detach(), b.detach()) < 1e-2
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)


def test_a_graphed_step_draws_fresh_numbers(kernels):
    x = torch.zeros(16, 3, 8, 8, device="cuda")
    draw = gp.graphed(lambda x: gp.interpolate(x, x + 1).flatten(1)[:, 0], warmup=1)
    draws = [draw(x).clone() for _ in range(5)]
    for i, a in enumerate(draws):
        assert not any(torch.equal(a, b) for b in draws[:i])


def test_a_graphed_step_refuses_other_shapes(kernels):
    double = gp.graphed(lambda x: x * 2, warmup=1)
    for _ in range(2):
        double(torch.ones(3, device="cuda"))
    with pytest.raises(ValueError, match=r"inputs\[0\]: wanted shape \(3,\), .* as at capture, got shape \(4,\)"):
        double(torch.ones(4, device="cuda"))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo_on_the_device(kernels, name):
    """The parameter gradients of scores and penalty on the GPU, in float64, against plain autograd there."""
    critic, x, kwargs = zoo.make(name)
    critic, x = critic.cuda().eval(), x.cuda()
    kwargs = {key: value.cuda() for key, value in kwargs.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = x.clone().requires_grad_()
        scores = critic(y, **kwargs)
        (grad,) = torch.autograd.grad(scores.sum(), y, create_graph=True)
        wanted = scores.square().sum() + 10 * oracles.penalty(grad, "two_sided", 1.0, "l2", "sample", "mean")
        right = torch.autograd.grad(wanted, list(critic.parameters()), allow_unused=True)
    scores, penalty = gp.score_and_penalty(critic, x, kind="r1", form="two_sided", critic_kwargs=kwargs)
    got = torch.autograd.grad(scores.square().sum() + penalty, list(critic.parameters()), allow_unused=True)
    total = sum(r.norm() ** 2 for r in right if r is not None) ** 0.5
    for g, r in zip(got, right, strict=True):
        g, r = (torch.zeros(()) if t is None else t for t in (g, r))
        assert (g - r).norm() < 1e-10 * total
