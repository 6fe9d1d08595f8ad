"""What only a GPU can show: CUDA graphs that draw anew, streams, more than 2^31 elements. Skipped without one."""

import oracles
import pytest
import torch

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
