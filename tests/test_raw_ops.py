"""The raw ops as torch sees them: opcheck for every op and option, and the refusal to lose a derivative."""

import itertools

import pytest
import torch

import gpkernels as gp
from gpkernels import registry

SEED = torch.tensor([3, 4])
OPS = torch.ops.gpkernels


def layouts(x):
    return [x, x.contiguous(memory_format=torch.channels_last)]


def samples(dtype):
    """(op, arguments) for every option of every op."""
    for real in layouts(torch.randn(2, 3, 4, 5).to(dtype)):
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        eps, sigma = torch.rand(2, dtype=accumulation), torch.rand(1, dtype=accumulation)
        for given, seed, per_element in ((eps, None, False), (None, SEED, False), (None, SEED, True)):
            yield (
                OPS.interpolate,
                (real, torch.randn_like(real), given, seed, per_element),
            )
            for need in ((True, True), (True, False), (False, True)):
                yield OPS.interpolate_backward, (real, given, seed, per_element, *need)
        for noise in (0, 1):
            yield OPS.perturb, (real, None, 0.5, noise, SEED)
            yield OPS.perturb, (real, sigma, 0.5, noise, SEED)
            yield OPS.perturb_backward, (real, 0.5, noise, SEED)
        for form, norm, axes, reduction in itertools.product(range(6), range(3), range(3), range(3)):
            options = (form, 1.0, norm, axes, reduction)
            value, saved = OPS.grad_norm_penalty(real, *options)
            upstream = torch.rand_like(value)
            yield OPS.grad_norm_penalty, (real, *options)
            yield OPS.grad_norm_penalty_backward, (upstream, real, saved, *options)
            tangent = torch.randn_like(real)
            yield OPS.grad_norm_penalty_double_backward, (tangent, upstream, real, saved, *options)
        losses = [torch.randn(2, dtype=accumulation) for _ in range(2)]
        for slope in (0.0, -1.0):
            yield OPS.pairwise_cost, (real, torch.randn_like(real), *losses, 0.01, slope)
        yield OPS.pairwise_cost_backward, tuple(losses)
        z, tangent, weight = torch.randn_like(real), torch.randn_like(real), torch.randn(3, dtype=accumulation)
        for groups, signs, gamma in itertools.product((0, 1, 3), (None, z), (None, weight)):
            mean, rstd = (torch.rand((2, groups) if groups else (3,), dtype=accumulation) for _ in range(2))
            options = (real, signs, mean, rstd, gamma, groups, 0.2)
            for need_affine in (True, False):
                yield OPS.norm_act_backward, (tangent, *options, need_affine)
            yield OPS.norm_act_double_backward, (tangent, torch.randn_like(real), *options)


def test_opcheck_schema_and_fake():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for op, arguments in samples(dtype):
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_dynamic_shapes():
    """The slower check, once an op and layout."""
    seen = set()
    for op, arguments in samples(torch.float32):
        key = (str(op), arguments[0].is_contiguous())
        if key not in seen:
            seen.add(key)
            torch.library.opcheck(op.default, arguments)
    assert len({name for name, _ in seen}) == 11


def test_every_backend_keeps_shape_dtype_and_strides(backend):
    """What the fake promises, each backend returns."""
    for op, arguments in samples(torch.float32):
        name = op.default._schema.name.partition("::")[2]
        order = 2 if name.endswith("double_backward") else 1 if name.endswith("_backward") else 0
        row = registry._rows[name.removesuffix("_backward").removesuffix("_double"), backend]
        results = (row.forward, row.backward, row.double_backward)[order](*arguments)
        promised = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        if isinstance(results, torch.Tensor):
            results, promised = (results,), (promised,)
        for got, wanted in zip(results, promised, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride()), name
            assert not got.isnan().any(), name


@pytest.mark.parametrize("op", ["interpolate", "perturb", "grad_norm_penalty", "pairwise_cost"])
def test_raw_op_refuses_a_tensor_that_requires_grad(op):
    real = torch.randn(2, 3, requires_grad=True)
    arguments = {
        "interpolate": (real, real, None, SEED, False),
        "perturb": (real, None, 0.5, 0, SEED),
        "grad_norm_penalty": (real, 0, 1.0, 0, 0, 0),
        "pairwise_cost": (real, real, torch.zeros(2), torch.zeros(2), 1.0, 0.0),
    }[op]
    with pytest.raises(RuntimeError, match=f"gpkernels.{op} is a raw kernel without a derivative"):
        getattr(OPS, op)(*arguments)
    with torch.no_grad():
        getattr(OPS, op)(*arguments)


X = torch.randn(2, 3)
ROWS = torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.interpolate(X, X[:, :2], None, SEED, False), "fake: wanted the shape and strides of real"),
        (lambda: OPS.interpolate(X, X.double(), None, SEED, False), "fake: wanted the dtype of real"),
        (lambda: OPS.interpolate(X, X, None, None, False), "eps, seed: wanted exactly one of the two, got neither"),
        (lambda: OPS.interpolate(X, X, torch.rand(3), None, False), "eps: wanted 2 contiguous elements, got 3"),
        (lambda: OPS.interpolate(X, X, torch.rand(2).double(), None, False), "eps: wanted the accumulation dtype"),
        (lambda: OPS.interpolate(X.t(), X.t(), None, SEED, False), "real: wanted contiguous or channels_last memory"),
        (lambda: OPS.interpolate(X, X, None, SEED[:1], False), "seed: wanted a contiguous int64 CPU tensor of 2"),
        (lambda: OPS.perturb(X.int(), None, 0.5, 0, SEED), "perturb: wanted float16, bfloat16, float32 or float64"),
        (lambda: OPS.perturb(X, None, 0.5, 2, SEED), "noise: wanted a code below 2, got 2"),
        (lambda: OPS.grad_norm_penalty(X, 6, 1.0, 0, 0, 0), "form: wanted a code below 6, got 6"),
        (lambda: OPS.grad_norm_penalty(X[0], 0, 1.0, 0, 1, 0), "grad: wanted at least 2 dimensions"),
        (
            lambda: OPS.grad_norm_penalty_backward(torch.rand(()), X, torch.rand(3), 0, 1.0, 0, 0, 0),
            "saved: wanted 2 contiguous elements, got 3",
        ),
        (lambda: OPS.pairwise_cost(X, X[:, :2], ROWS, ROWS, 1.0, 0.0), "fake: wanted the shape and strides of real"),
        (lambda: OPS.pairwise_cost(X, X.double(), ROWS, ROWS, 1.0, 0.0), "fake: wanted the dtype of real"),
        (lambda: OPS.pairwise_cost(X, X, X, ROWS, 1.0, 0.0), "loss_real: wanted 2 contiguous elements, got 6"),
        (lambda: OPS.pairwise_cost(X, X, ROWS, ROWS.half(), 1.0, 0.0), "loss_fake: wanted the accumulation dtype"),
        (lambda: OPS.pairwise_cost(X.int(), X.int(), ROWS, ROWS, 1.0, 0.0), "pairwise_cost: wanted float16, bfloat16"),
        (lambda: OPS.pairwise_cost_backward(ROWS[:1], ROWS), "grad_cost: wanted 2 contiguous elements, got 1"),
        (lambda: OPS.pairwise_cost_backward(ROWS.half(), ROWS.half()), "slope_at: wanted the accumulation dtype"),
    ],
)
def test_native_kernels_check_their_arguments(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_empty_tensors_reach_no_kernel_loop():
    for shape in ((0, 3), (2, 0)):
        x = torch.zeros(shape)
        assert OPS.interpolate(x, x, None, SEED, True).shape == shape
        assert OPS.perturb(x, None, 0.5, 0, SEED).shape == shape
        value, saved = OPS.grad_norm_penalty(x, 5, 1.0, 0, 0, 1)
        assert value == 0
        assert saved.tolist() == [[0.0] * shape[0]]
        losses = torch.arange(1.0, shape[0] + 1), torch.zeros(shape[0])
        cost, delta, slope_at = OPS.pairwise_cost(x, x, *losses, 0.5, -1.0)
        assert torch.equal(cost, losses[0])
        assert torch.equal(delta, losses[1])
        assert [g.tolist() for g in OPS.pairwise_cost_backward(cost, slope_at)] == [cost.tolist(), (-cost).tolist()]


@pytest.mark.parametrize("per_element", [False, True])
def test_compiles_fullgraph(per_element):
    """Interpolation, and two epilogues with their backward, norm -> penalty -> mean and the pairs' costs, without a
    graph break."""

    def f(real, fake, grad):
        losses = grad.flatten(1).square().sum(1), grad.flatten(1).sum(1)
        cost, delta = gp.pairwise_cost(real, fake, *losses, slope=-0.5)
        unused = gp.interpolate(real, fake, per_element=per_element).sum() * 0
        return unused + gp.grad_norm_penalty(grad) + (cost * delta).mean()

    real, fake = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    grad = torch.randn(4, 3, 5, 5, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for function in (f, compiled):
        value = function(real, fake, grad)
        (first,) = torch.autograd.grad(value, grad)
        if function is f:
            wanted = (value, first)
    torch.testing.assert_close((value, first), wanted)


def test_torch_func_sees_through_the_functions():
    """Inside torch.func transforms the reference is traced: derivatives of any order are right, or it raises."""
    grad = torch.randn(3, 4, dtype=torch.float64)

    def penalty(g):
        return gp.grad_norm_penalty(g, form="two_sided")

    def plain(g):
        return ((torch.linalg.vector_norm(g, dim=1) - 1) ** 2).mean()

    torch.testing.assert_close(torch.func.grad(penalty)(grad), torch.func.grad(plain)(grad))
    torch.testing.assert_close(torch.func.hessian(penalty)(grad), torch.func.hessian(plain)(grad))
    with gp.backend("cpu"), pytest.raises(gp.BackendError, match=r"torch.func transforms are active"):
        torch.func.grad(penalty)(grad)

    def cost(x, op=gp.pairwise_cost):
        value, delta = op(x, x.flip(0), x.square().sum(1), x.sum(1), margin=0.3, slope=-0.5)
        return (value * (1 + delta)).sum()

    def plain_cost(real, fake, loss_real, loss_fake, margin, slope):
        delta = margin * (real - fake).detach().abs().sum(1)
        a = delta + loss_real - loss_fake
        return torch.maximum(a, slope * a), delta

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(cost)(grad), transform(lambda x: cost(x, plain_cost))(grad))
