"""The raw ops of norm_act on every backend, against the reference in float64 and against plain autograd through
torch's own norms."""

import dataclasses
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gpkernels as gp
from gpkernels import registry
from gpkernels.ops.norm_act import reference

OPS = torch.ops.gpkernels
EPS = 1e-5
# The bound on an error, as a share of what the terms of a result add up to without their signs.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
SHAPES = [
    (1, 1),
    (5, 1),
    (1, 12),
    (33, 24),
    (70, 517),
    (3, 9000),
    (4, 6, 5),
    (1, 6, 1, 1),
    (3, 12, 4, 4),
    (2, 6, 7, 9),
    (35, 130, 3, 3),
    (7, 3, 5, 5),
    (2, 700, 2, 2),
    (2, 6, 1, 33),
    (3, 2, 70, 71),
    (2, 6, 2, 3, 4),
]
# More than the caches of one thread hold, in every way the groups can lie.
LARGE_SHAPES = [(1, 2, 270, 250), (2, 70, 33, 31), (120, 4, 24, 25), (200, 600), (3, 70002), (5000, 12)]
# (weight, z, dtype); see draw.
OPTIONS = [
    ("normal", "random", torch.float32),
    ("signed", "positive", torch.float64),
    ("none", "random", torch.bfloat16),
    ("signed", "random", torch.float16),
    ("none", "none", torch.float32),
]


@dataclasses.dataclass
class Case:
    """The arguments of the two raw ops."""

    tangent: Tensor
    grad_out: Tensor
    x: Tensor
    z: Tensor | None
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    groups: int
    slope: float

    def arguments(self, dtype=None, with_tangent=False):
        values = list(vars(self).values())[0 if with_tangent else 1 :]
        return [v.to(dtype) if dtype and isinstance(v, Tensor) else v for v in values]


def layout_like(shape, channels_last):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats.get(len(shape), torch.contiguous_format) if channels_last else torch.contiguous_format


def with_layouts(shapes):
    """(shape, channels_last) for the layouts that a shape has."""
    return [(shape, last) for shape in shapes for last in ((False, True) if len(shape) in (4, 5) else (False,))]


def group_choices(channels):
    """Batch, layer, group and instance statistics."""
    return [0, *sorted({1, channels, *(g for g in (2, 3) if channels % g == 0)})]


def draw(shape, groups, dtype, channels_last=False, weight="normal", z="random", slope=0.2, shift=0.5, device="cpu"):
    """A case; weight is "normal", "signed" (also 0) or "none", z "random", "positive" or "none"."""

    def tensor():
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout_like(shape, channels_last))

    x = tensor().add_(shift)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randn(shape[1], dtype=accumulation, device=device)
    if weight == "signed":
        weights[::2] = -weights[::2].abs()
        weights[::3] = 0
    # in float16, 1 / (variance + eps) of the smallest groups has to be finite
    mean, rstd = reference.statistics(x.double(), groups, 1e-2 if dtype == torch.float16 else EPS)
    return Case(
        tensor(),
        tensor(),
        x,
        {"random": tensor(), "positive": tensor().abs_(), "none": None}[z],
        mean.to(accumulation),
        rstd.to(accumulation),
        None if weight == "none" else weights,
        groups,
        slope,
    )


def per_element(statistic, x, groups):
    """A mean or rstd of each element's group, in x's shape."""
    if groups == 0:
        return statistic.reshape(1, -1, *[1] * (x.dim() - 2)).expand_as(x)
    return statistic.repeat_interleave(x.shape[1] // groups, 1).reshape(*x.shape[:2], *[1] * (x.dim() - 2)).expand_as(x)


def scales(case):
    """How large the terms of each result are: of (in x, weight, bias) and (in grad_out, x, weight)."""
    b, g, x, z, mean, rstd, weight, groups, slope = case.arguments(torch.float64, with_tangent=True)
    r = per_element(rstd, x, groups)
    xh = (x - per_element(mean, x, groups)) * r
    act = torch.ones_like(x) if z is None else torch.where(z > 0, 1.0, slope)
    gamma = 1.0 if weight is None else weight.reshape(1, -1, *[1] * (x.dim() - 2))
    dims = [0, *range(2, x.dim())]
    a0 = act * g
    a, b = ((v.abs() + v.square().mean().sqrt()) * (1 + xh.abs()) for v in (gamma * a0, b))
    return (
        [r * a, (a0 * xh).abs().sum(dims), a0.abs().sum(dims)],
        [r * gamma * act * b, r * r * a * b, (r * a0 * b).abs().sum(dims)],
    )


def has_layout_of(result, x):
    """The strides of x, but for dimensions of size 1, where they mean nothing."""
    return all(a == b or n == 1 for a, b, n in zip(result.stride(), x.stride(), x.shape, strict=True))


def check(results, wanted, sizes, *what):
    for i, (got, want, size) in enumerate(zip(results, wanted, sizes, strict=True)):
        assert got.shape == want.shape, (i, *what)
        error = (got.double() - want).norm().item()
        # a float16 below 6e-8 is 0
        bound = TOLERANCE[got.dtype] * size.norm().item() + (1e-7 * got.numel() if got.dtype == torch.float16 else 0)
        assert error <= bound, (i, error, bound, *what)


def check_against_reference(backend, case, *what):
    row, dtype = registry._rows["norm_act", backend], case.x.dtype
    first_sizes, second_sizes = scales(case)
    for need_affine in (True, False):
        results = row.backward(*case.arguments(), need_affine)
        assert results[0].dtype == dtype
        assert has_layout_of(results[0], case.x)
        wanted = reference.norm_act_backward(*case.arguments(torch.float64), need_affine)
        sizes = first_sizes if need_affine else [first_sizes[0], *wanted[1:]]
        check(results, wanted, sizes, "backward", *what)
    results = row.double_backward(*case.arguments(with_tangent=True))
    assert all(r.dtype == dtype and has_layout_of(r, case.x) for r in results[:2])
    wanted = reference.norm_act_double_backward(*case.arguments(torch.float64, with_tangent=True))
    check(results, wanted, second_sizes, "double backward", *what)


@pytest.mark.parametrize(("shape", "channels_last"), with_layouts(SHAPES), ids=str)
def test_equals_the_reference(backend, device, shape, channels_last):
    for groups in group_choices(shape[1]):
        for weight, z, dtype in OPTIONS:
            case = draw(shape, groups, dtype, channels_last, weight, z, 0.0 if groups == 1 else 0.2, device=device)
            check_against_reference(backend, case, groups, weight, z)


@pytest.mark.parametrize(("shape", "channels_last"), with_layouts(LARGE_SHAPES), ids=str)
def test_large_equals_the_reference(backend, device, shape, channels_last):
    for groups in group_choices(shape[1])[:3]:
        for weight, z, dtype in OPTIONS[::2]:
            case = draw(shape, groups, dtype, channels_last, weight, z, device=device)
            check_against_reference(backend, case, groups, weight, z)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    choice=st.integers(0, 4),
    channels_last=st.booleans(),
    options=st.tuples(st.sampled_from(("normal", "signed", "none")), st.sampled_from(("random", "positive", "none"))),
    slope=st.sampled_from((0.0, 0.01, 0.2, 1.0)),
    dtype=st.sampled_from(tuple(TOLERANCE)),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference_for_any_shape_and_options(shape, choice, channels_last, options, slope, dtype, seed):
    torch.manual_seed(seed)
    choices = group_choices(shape[1])
    case = draw(shape, choices[choice % len(choices)], dtype, channels_last, *options, slope)
    with gp.backend("cpu"):
        check_against_reference("cpu", case)


def torch_norms(x, weight, bias):
    """(groups, torch's own norm, x as the ops take it) for every norm that x fits."""
    if x.numel() > x.shape[1]:
        yield 0, F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    for groups in {g for g in group_choices(x.shape[1]) if g}:
        if x.numel() > x.shape[0] * groups:
            yield groups, F.group_norm(x, groups, weight, bias, EPS)
    if x[0, 0].numel() > 1:
        yield x.shape[1], F.instance_norm(x, None, None, weight, bias, eps=EPS)
    else:
        yield 1, F.layer_norm(x.flatten(1), (x.shape[1],), weight, bias, EPS).reshape(x.shape)


def batch_statistics(x, groups):
    split = x.transpose(0, 1).flatten(1) if groups == 0 else x.reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(split, dim=-1, correction=0)
    return mean, (variance + EPS).rsqrt()


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (4, 6, 3, 5), (2, 4, 2, 3, 2), (40, 6, 4, 4)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_derivatives_equal_plain_autograd(backend, device, shape, slope, channels_last):
    """First and second derivative in float64 through torch's own norm and activation."""
    row = registry._rows["norm_act", backend]

    def tensor():
        return torch.randn(shape, dtype=torch.float64, device=device).contiguous(
            memory_format=layout_like(shape, channels_last)
        )

    x, tangent, upstream = tensor().add_(0.3).requires_grad_(), tensor(), tensor().requires_grad_()
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64, device=device)
    weight[0], weight[1] = 0.0, -0.7
    weight.requires_grad_()
    bias.requires_grad_()
    for groups, y in torch_norms(x, weight, bias):
        z = y if slope is None else F.leaky_relu(y, slope)
        first = torch.autograd.grad(z, (x, weight, bias), upstream, create_graph=True)
        second = torch.autograd.grad((first[0] * tangent).sum(), (upstream, x, weight))
        mean, rstd = batch_statistics(x.detach(), groups)
        signs = None if slope is None else z.detach().contiguous(memory_format=layout_like(shape, channels_last))
        rest = (x.detach(), signs, mean, rstd, weight.detach(), groups, slope or 0.0)
        got = row.backward(upstream.detach(), *rest, True)
        got += row.double_backward(tangent, upstream.detach(), *rest)
        for g, w in zip(got, first + second, strict=True):
            assert oracles.relative_error(g, w) < 1e-11, groups


@pytest.mark.parametrize("shape", [(5, 7), (4, 6, 3, 5)], ids=str)
def test_forward_equals_torch(backend, device, shape):
    x = torch.randn(shape, dtype=torch.float64, device=device)
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64, device=device)
    for groups, y in torch_norms(x, weight, bias):
        for slope in (None, 0.0, 0.2):
            z, *statistics = registry._rows["norm_act", backend].forward(x, weight, bias, groups, EPS, slope)
            torch.testing.assert_close(z, y if slope is None else F.leaky_relu(y, slope))
            torch.testing.assert_close(tuple(statistics), batch_statistics(x, groups))


@pytest.mark.parametrize(("shape", "groups"), [((16, 8, 32, 32), 0), ((4, 6, 40, 40), 6), ((6, 30000), 1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_float32_keeps_its_accuracy_far_from_zero(backend, device, shape, groups, channels_last):
    """A mean of 100 standard deviations: a variance as E[x^2] - E[x]^2 would have lost four digits."""
    case = draw(shape, groups, torch.float32, channels_last, shift=100.0, device=device)
    check_against_reference(backend, case)


def test_float32_sums_of_a_million_equal_terms(backend, device):
    """Rounding errors that all have one sign, the worst case of a running sum."""
    for shape, groups in (((64, 2, 128, 128), 0), ((2, 2, 700, 700), 2), ((200000, 5), 0), ((70000, 16), 1)):
        case = draw(shape, groups, torch.float32, z="none", device=device)
        case.grad_out.fill_(0.1)
        *_, grad_bias = registry._rows["norm_act", backend].backward(*case.arguments(), True)
        wanted = torch.full_like(grad_bias, math.prod(shape) / shape[1], dtype=torch.float64)
        wanted *= case.grad_out.flatten()[0].double()
        assert oracles.relative_error(grad_bias, wanted) < 2e-6, shape


@pytest.mark.parametrize("groups", [0, 1, 2, 4])
def test_constant_groups(backend, device, groups):
    """Without variance the result is bias, and rstd 1 / sqrt(eps)."""
    case = draw((3, 4, 2, 5), groups, torch.float64, device=device)
    case.x = torch.ones_like(case.x) * 1.7
    mean, rstd = batch_statistics(case.x, groups)
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5))
    case.mean, case.rstd = mean, rstd
    check_against_reference(backend, case)


def test_nan_stays_in_its_group_and_is_not_positive(backend, device):
    case = draw((3, 4, 3, 3), 4, torch.float32, device=device)
    row = registry._rows["norm_act", backend]
    case.z[1, 2, 0, 0] = float("nan")
    clean = dataclasses.replace(case, z=case.z.nan_to_num(-1.0))
    for got, wanted in zip(row.backward(*case.arguments(), True), row.backward(*clean.arguments(), True), strict=True):
        assert torch.equal(got, wanted)
    case.grad_out[1, 2, 0, 0] = float("nan")
    grad_x, *affine = row.backward(*case.arguments(), True)
    assert grad_x.isnan().sum() == grad_x[1, 2].isnan().sum() == 9
    assert all(a.isnan().tolist() == [False, False, True, False] for a in affine)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0, 4)], ids=str)
def test_empty_tensors(backend, device, shape):
    for groups in (0, 1, shape[1]):
        x = torch.zeros(shape, device=device)
        mean = torch.zeros((shape[0], groups) if groups else (shape[1],), device=device)
        weight = torch.ones(shape[1], device=device)
        row = registry._rows["norm_act", backend]
        for need_affine in (True, False):
            grad_x, *affine = row.backward(x, x, x, mean, mean, weight, groups, 0.2, need_affine)
            assert grad_x.shape == shape
            assert all(torch.equal(a, torch.zeros(shape[1] * need_affine, device=device)) for a in affine)
        *in_elements, in_weight = row.double_backward(x, x, x, None, mean, mean, None, groups, 0.2)
        assert all(i.shape == shape for i in in_elements)
        assert torch.equal(in_weight, torch.zeros(shape[1], device=device))


@pytest.mark.parametrize("shape", [(40, 64, 8, 8), (3, 5, 90, 91), (64, 5000), (3, 70002), (20, 12, 4, 4)], ids=str)
def test_result_does_not_depend_on_the_number_of_threads(shape):
    threads = torch.get_num_threads()
    for channels_last in (False, True):
        for groups in group_choices(shape[1])[:4]:
            case = draw(shape, groups, torch.float32, channels_last)
            results = []
            try:
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    first = OPS.norm_act_backward(*case.arguments(), True)
                    results.append(first + OPS.norm_act_double_backward(*case.arguments(with_tangent=True)))
            finally:
                torch.set_num_threads(threads)
            for other in results[1:]:
                assert all(map(torch.equal, results[0], other)), groups


X, M, W = torch.randn(2, 6, 3), torch.zeros(6), torch.ones(6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0, 0], "grad_out": X[0, 0]}, "x: wanted at least 2 dimensions, got 1"),
        ({"x": X.transpose(0, 1), "grad_out": X.transpose(0, 1)}, "x: wanted contiguous or channels_last memory"),
        (
            {"x": X.int(), "grad_out": X.int(), "tangent": X.int(), "z": None},
            "wanted float16, bfloat16, float32 or float64",
        ),
        ({"grad_out": X[:, :3]}, "grad_out: wanted the shape and strides of x"),
        ({"grad_out": X.double()}, "grad_out: wanted the dtype of x"),
        ({"z": X.half()}, "z: wanted the dtype of x"),
        ({"z": X[:1]}, "z: wanted the shape and strides of x"),
        ({"tangent": X.bfloat16()}, "tangent: wanted the dtype of x"),
        ({"mean": M[:5]}, "mean: wanted 6 contiguous elements, got 5"),
        ({"rstd": M.repeat(2)}, "rstd: wanted 6 contiguous elements, got 12"),
        ({"rstd": M.double()}, "rstd: wanted the accumulation dtype"),
        ({"weight": W.bfloat16()}, "weight: wanted the accumulation dtype"),
        ({"weight": W[:3]}, "weight: wanted 6 contiguous elements, got 3"),
        ({"groups": 4}, "groups: wanted 0 or a divisor of the 6 channels, got 4"),
        ({"groups": -1}, "groups: wanted 0 or a divisor of the 6 channels, got -1"),
        ({"groups": 3, "mean": M[:3]}, "mean: wanted 6 contiguous elements, got 3"),
    ],
)
def test_native_kernels_check_their_arguments(change, message):
    case = dataclasses.replace(Case(X, X, X, X, M, M, W, 0, 0.2), **change)
    with pytest.raises(RuntimeError, match=message):
        OPS.norm_act_double_backward(*case.arguments(with_tangent=True))
    if "tangent" not in change:
        with pytest.raises(RuntimeError, match=message):
            OPS.norm_act_backward(*case.arguments(), True)
