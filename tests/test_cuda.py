"""The CUDA kernels without a GPU: their device code executed on the host (tests/shim).

What this cannot show is their speed and how they behave on a device.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch
from shim import build

from gpkernels.ops.grad_penalty import reference as penalty_reference
from gpkernels.ops.interpolate import reference as interpolate_reference
from gpkernels.ops.norm_act import reference as norm_reference
from gpkernels.ops.pairwise_cost import reference as pair_reference
from gpkernels.ops.perturb import reference as perturb_reference

ROOT = Path(__file__).parent.parent
SEED = torch.tensor([3, -4])
CPU = torch.ops.gpkernels


@pytest.fixture(scope="module")
def ops():
    return build.load()


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def unaligned(x):
    """The same values one element into a larger allocation."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].copy_(x.reshape(-1)).view(x.shape)


def unaligned_channels_last(x):
    return unaligned(x.movedim(1, -1).contiguous()).movedim(-1, 1)


LAYOUTS = (contiguous, channels_last, unaligned, unaligned_channels_last)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(1, 1), (5, 3), (3, 2, 5, 7), (2, 8, 4, 6), (2, 40, 3, 4), (2, 3, 2, 4, 3), (300, 2, 1), (2, 2, 99, 131)]


def cases(shapes=SHAPES, dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64)):
    """(shape, dtype, layout), every pair of them at least once."""
    for index, (shape, layout) in enumerate(itertools.product(shapes, LAYOUTS)):
        if len(shape) > 2 or layout in (contiguous, unaligned):
            yield shape, dtypes[(index + index // len(LAYOUTS)) % len(dtypes)], layout
            yield shape, torch.float32, layout


def draw(shape, dtype, layout, scale=1.0):
    return layout((torch.randn(shape, dtype=torch.float64) * scale).to(dtype))


def close(got, wanted, tolerance, what):
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), what
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}\n{text}")


@pytest.mark.parametrize("mode", ["given", "sample", "element"])
def test_interpolate(ops, mode):
    for shape, dtype, layout in cases():
        real, fake = draw(shape, dtype, layout), draw(shape, dtype, layout)
        eps = torch.rand(shape[0], dtype=torch.promote_types(dtype, torch.float32)) if mode == "given" else None
        options = (eps, None if mode == "given" else SEED, mode == "element")
        what = f"{shape} {dtype} {layout.__name__}"
        before = build.launches()
        got = ops["interpolate"](real, fake, *options)
        assert build.launches() == before + 1
        close(got, interpolate_reference.interpolate(real, fake, *options), TOLERANCE[dtype], what)
        for need in ((True, True), (True, False), (False, True)):
            before = build.launches()
            got = ops["interpolate_backward"](real, *options, *need)
            assert build.launches() == before + 1
            wanted = interpolate_reference.interpolate_backward(real, *options, *need)
            for one, other in zip(got, wanted, strict=True):
                close(one, other, TOLERANCE[dtype], what)


@pytest.mark.parametrize("noise", [0, 1], ids=["normal", "uniform"])
def test_perturb(ops, noise):
    for shape, dtype, layout in cases():
        real = draw(shape, dtype, layout)
        sigma = torch.rand(1, dtype=torch.promote_types(dtype, torch.float32))
        what = f"{shape} {dtype} {layout.__name__}"
        for given in (None, sigma):
            before = build.launches()
            got = ops["perturb"](real, given, 0.7, noise, SEED)
            assert build.launches() == before + 1
            tolerance = max(TOLERANCE[dtype], 1e-6)  # the noise is float32
            close(got, perturb_reference.perturb(real, given, 0.7, noise, SEED), tolerance, what)
        before = build.launches()
        got = ops["perturb_backward"](real, 0.7, noise, SEED)
        assert build.launches() <= before + 2
        wanted = perturb_reference.perturb_backward(real.double(), 0.7, noise, SEED)
        assert abs(got.double() - wanted) <= 1e-5 * real.double().norm(), what


def test_the_numbers_are_those_of_the_cpu_kernels(ops):
    """Bit by bit, in every unit of a long tensor, whichever the layout, for seeds that use all 64 bits."""
    ones = torch.ones(3, 5, 41, 37)
    for seed in (SEED, torch.tensor([2**63 - 1, -(2**63)]), torch.tensor([0, 1 << 40])):
        for x, per_element in itertools.product((ones, channels_last(ones), unaligned(ones)), (False, True)):
            arguments = (x, torch.zeros_like(x), None, seed, per_element)
            assert torch.equal(ops["interpolate"](*arguments), CPU.interpolate(*arguments))
        zeros = torch.zeros_like(ones)
        assert torch.equal(ops["perturb"](zeros, None, 1.0, 1, seed), CPU.perturb(zeros, None, 1.0, 1, seed))
    words = oracles.words(SEED, ones.numel())
    eps = ops["interpolate"](ones, torch.zeros_like(ones), None, SEED, True)
    assert eps.reshape(-1).tolist() == [(word >> 8) * 2.0**-24 for word in words]


def penalties_agree(ops, x, tangent, options, what, tolerance):
    before = build.launches()
    value, saved = ops["grad_norm_penalty"](x, *options)
    assert build.launches() <= before + 2, what
    exact = x.double()
    wanted_value, wanted_saved = penalty_reference.grad_norm_penalty(exact, *options)
    accumulation = torch.promote_types(x.dtype, torch.float32)
    loose = max(TOLERANCE[accumulation], 1e-12)
    close(value, wanted_value.to(accumulation), loose * max(1.0, wanted_value.abs().max().item()), what)
    close(saved, wanted_saved.to(accumulation), loose, what)

    upstream = torch.rand_like(value)
    before = build.launches()
    first = ops["grad_norm_penalty_backward"](upstream, x, saved, *options)
    assert build.launches() == before + 1, what
    wanted = penalty_reference.grad_norm_penalty_backward(upstream.double(), exact, wanted_saved, *options)
    close(first, wanted.to(x.dtype), tolerance * max(1.0, wanted.abs().max().item()), what)

    before = build.launches()
    got = ops["grad_norm_penalty_double_backward"](tangent, upstream, x, saved, *options)
    assert build.launches() <= before + 3, what
    doubles = (tensor.double() for tensor in (tangent, upstream, x))
    wanted = penalty_reference.grad_norm_penalty_double_backward(*doubles, wanted_saved, *options)
    for one, other in zip(got, wanted, strict=True):  # <tangent, direction> may cancel
        close(one, other.to(one.dtype), max(tolerance, 10 * loose) * max(1.0, other.abs().max().item()), what)


@pytest.mark.parametrize("axes", range(3), ids=penalty_reference.AXES)
@pytest.mark.parametrize("norm", range(3), ids=penalty_reference.NORMS)
def test_penalty(ops, norm, axes):
    """Every form and reduction in every case of shape, dtype and layout, the expensive shapes with some only."""
    combinations = list(itertools.product(range(6), range(3)))
    for index, (shape, dtype, layout) in enumerate(cases()):
        elements = torch.Size(shape[1:]).numel() if axes == 0 else shape[1] if axes == 1 else torch.Size(shape).numel()
        scale = 1.3 / (elements**0.5 if norm == 0 else elements if norm == 1 else 2)
        x, tangent = draw(shape, dtype, layout, scale), draw(shape, dtype, layout)
        large = torch.Size(shape).numel() > 10_000
        for form, reduction in [combinations[(7 * index + i) % 18] for i in range(2)] if large else combinations:
            options = (form, 1.0, norm, axes, reduction)
            penalties_agree(ops, x, tangent, options, f"{shape} {dtype} {layout.__name__} {options}", TOLERANCE[dtype])


def test_linf_counts_ties_across_threads_and_blocks(ops):
    x = torch.ones(2, 20_000)
    x[1, ::2] = -1.0
    x[1, 7] = 0.5
    _, saved = ops["grad_norm_penalty"](x, 4, 1.0, 2, 0, 2)
    assert saved.tolist() == [[1.0, 1.0], [20_000.0, 19_999.0]]
    _, saved = ops["grad_norm_penalty"](torch.zeros(2, 5), 4, 1.0, 2, 0, 2)
    assert saved.tolist() == [[0.0, 0.0], [5.0, 5.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", range(3), ids=penalty_reference.NORMS)
def test_nan_and_inf_stay_visible(ops, norm, bad):
    for length, position in ((40, 33), (20_000, 5), (20_000, 19_999)):
        x = torch.ones(2, length)
        x[1, position] = bad
        value, saved = ops["grad_norm_penalty"](x, 4, 1.0, norm, 0, 2)
        assert value[0].isfinite()
        assert saved[0, 1].isnan() if bad != bad else saved[0, 1].isinf()
    columns = torch.ones(1, 40, 12)
    columns[0, 17, 3] = bad
    _, saved = ops["grad_norm_penalty"](columns, 4, 1.0, norm, 1, 0)
    assert saved[0].isfinite().sum() == 11
    assert not saved[0, 0, 3].isfinite()


def pairs_agree(ops, real, fake, losses, options, what):
    """Two launches where a block does not hold its samples whole, else one."""
    dtype, elements = losses[0].dtype, real.shape[1:].numel()
    before = build.launches()
    got = ops["pairwise_cost"](real, fake, *losses, *options)
    between = build.launches()
    grads = ops["pairwise_cost_backward"](losses[0], got[2])
    assert between - before == (2 if elements >= 2 * 4 * 256 * (8 if real.dtype.itemsize == 2 else 4) else 1), what
    assert build.launches() == between + 1, what
    wanted = pair_reference.pairwise_cost(*(x.double() for x in (real, fake, *losses)), *options)
    wanted += pair_reference.pairwise_cost_backward(losses[0].double(), wanted[2])
    for one, other in zip((*got, *grads), wanted, strict=True):
        close(one, other.to(dtype), TOLERANCE[dtype], what)


@pytest.mark.parametrize("slope", [1.0, 0.0, -1.0, 0.3, -2.0])
def test_pairwise_cost(ops, slope):
    for shape, dtype, layout in cases():
        real, fake = draw(shape, dtype, layout), draw(shape, dtype, layout)
        losses = [torch.randn(shape[0], dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2)]
        options = (0.7 / torch.Size(shape[1:]).numel(), slope)
        pairs_agree(ops, real, fake, losses, options, f"{shape} {dtype} {layout.__name__} {slope}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pairwise_cost_keeps_nan_and_inf_in_their_pair(ops, bad):
    for length, position in ((40, 33), (20_000, 5), (20_000, 19_999)):
        x = torch.ones(3, length)
        x[1, position] = bad
        cost, delta, slope_at = ops["pairwise_cost"](x, -x, torch.zeros(3), torch.ones(3), 1 / length, 0.5)
        assert cost[::2].tolist() == pytest.approx([1.0, 1.0])
        for value in (cost[1], delta[1]):
            assert value.isnan() if bad != bad else value == bad
        assert slope_at.tolist() == [1.0, 0.5 if bad != bad else 1.0, 1.0]


# shape: the numbers of groups
NORM_SHAPES = {
    (4, 6): (0, 1, 2, 6),
    (300, 8): (0, 1, 4),  # samples by parts
    (9000, 3): (0,),  # split columns
    (3, 20_000): (1, 4),  # split rows
    (5, 8, 2, 2): (0, 1, 8),  # runs too short for a batch's
    (3, 16, 4, 4): (0, 1, 4, 16),
    (2, 12, 5, 7): (0, 1, 3, 12),
    (70, 6, 3): (0, 2),
    (2, 20, 8): (2,),  # more threads than runs
    (2, 3, 2, 4, 3): (0, 1, 3),
    (2, 300, 3, 5): (1, 10, 20),  # bands of a part of a group; of groups of 30, of 15
    (2, 1024, 3, 3): (1, 2),
    (2, 8, 40, 60): (0, 1, 2, 8),  # split groups
}


def norms_agree(ops, x, grad_out, tangent, groups, act, affine, need_affine, what):
    dtype, accumulation, channels = x.dtype, torch.promote_types(x.dtype, torch.float32), x.shape[1]
    weight = torch.randn(channels, dtype=accumulation) if affine else None
    if affine and channels > 1:
        weight[0] = 0.0
    z, mean, rstd = norm_reference.norm_act(x, weight, None, groups, 0.1, 0.2 if act else None)
    given = (grad_out, x, torch.empty_like(x).copy_(z) if act else None, mean, rstd, weight, groups, 0.2)
    doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in given]
    before = build.launches()
    got = ops["norm_act_backward"](*given, need_affine)
    between = build.launches()
    got += ops["norm_act_double_backward"](tangent, *given)
    assert between - before <= (3 if need_affine else 2), what
    assert build.launches() - between <= 3, what
    wanted = norm_reference.norm_act_backward(*doubles, need_affine)
    wanted += norm_reference.norm_act_double_backward(tangent.double(), *doubles)
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        like_x = index in (0, 3, 4)
        if like_x:
            assert one.stride() == x.stride(), what
        tolerance = TOLERANCE[dtype] if like_x else 5 * TOLERANCE[accumulation]  # sums over a channel may cancel
        scale = max([1.0, *other.abs().reshape(-1).max(0).values.reshape(-1).tolist()]) if other.numel() else 1.0
        close(one, other.to(dtype if like_x else accumulation), tolerance * scale, f"{what} result {index}")


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_act(ops, shape):
    options = list(itertools.product((True, False), repeat=3))
    for index, ((_, dtype, layout), groups) in enumerate(itertools.product(cases([shape]), NORM_SHAPES[shape])):
        x, grad_out, tangent = (draw(shape, dtype, layout) for _ in range(3))
        for chosen in (options[index % 8], options[(5 * index + 3) % 8]):
            what = f"{shape} {dtype} {layout.__name__} groups={groups} act, affine, need_affine={chosen}"
            norms_agree(ops, x, grad_out, tangent, groups, *chosen, what)


def test_sums_of_a_million_keep_their_digits(ops):
    """float32, what is summed far from 0: added up one by one, a thousandth would be lost."""
    for layout, groups in itertools.product((contiguous, channels_last), (0, 1)):
        x, grad_out, tangent = (draw((1, 2, 700, 720), torch.float32, layout) + 3 for _ in range(3))
        statistics = norm_reference.statistics(x.double(), groups, 1e-5)
        mean, rstd = (value.float() for value in statistics)
        got = ops["norm_act_backward"](grad_out, x, None, mean, rstd, None, groups, 0.2, True)
        got += ops["norm_act_double_backward"](tangent, grad_out, x, None, mean, rstd, None, groups, 0.2)
        grad_out, x, tangent = grad_out.double(), x.double(), tangent.double()
        wanted = norm_reference.norm_act_backward(grad_out, x, None, *statistics, None, groups, 0.2, True)
        wanted += norm_reference.norm_act_double_backward(tangent, grad_out, x, None, *statistics, None, groups, 0.2)
        for one, other in zip(got, wanted, strict=True):
            size = 10.0 if one.shape == x.shape else 10.0 * 700 * 720  # of what is added up
            assert (one - other).abs().max() <= 3e-6 * size, f"{layout.__name__} groups={groups}"


def test_norm_act_keeps_nan_in_its_group(ops):
    """A NaN of z counts as not positive; one of grad_out spoils its own group, whatever the way it is summed."""
    for shape, layout in itertools.product(((3, 4), (3, 4, 2, 3), (2, 4, 96, 96)), (contiguous, channels_last)):
        if layout is channels_last and len(shape) < 3:
            continue
        x, z, grad_out = (draw(shape, torch.float32, layout) for _ in range(3))
        mean, rstd = norm_reference.statistics(x, 2, 0.1)
        spoilt, negative = z.clone(), z.clone()
        spoilt[0, 0], negative[0, 0] = float("nan"), -1.0
        one, other = (
            ops["norm_act_backward"](grad_out, x, signs, mean, rstd, None, 2, 0.2, True) for signs in (spoilt, negative)
        )
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        grad_out[1, 3] = float("nan")
        (grad_x, *_) = ops["norm_act_backward"](grad_out, x, z, mean, rstd, None, 2, 0.2, False)
        assert grad_x[1, 2:].isnan().all()
        assert grad_x.isnan().sum() == grad_x[1, 2:].numel()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_tensors(ops, shape):
    x = torch.zeros(shape)
    for name in ("interpolate", "perturb"):
        arguments = (x, x, None, SEED, True) if name == "interpolate" else (x, None, 0.5, 0, SEED)
        before = build.launches()
        assert ops[name](*arguments).shape == shape
        assert build.launches() == before
    assert ops["perturb_backward"](x, 0.5, 0, SEED) == 0
    for form, norm, axes, reduction in itertools.product(range(6), range(3), range(3), range(3)):
        options = (form, 1.0, norm, axes, reduction)
        got = ops["grad_norm_penalty"](x, *options)
        torch.testing.assert_close(got, CPU.grad_norm_penalty(x, *options), equal_nan=True)
        value, saved = got
        upstream = torch.ones_like(value)
        assert ops["grad_norm_penalty_backward"](upstream, x, saved, *options).shape == shape
        second = ops["grad_norm_penalty_double_backward"](x, upstream, x, saved, *options)
        wanted = CPU.grad_norm_penalty_double_backward(x, upstream, x, saved, *options)
        torch.testing.assert_close(second, wanted, equal_nan=True)
    losses = torch.arange(1.0, shape[0] + 1)
    got = ops["pairwise_cost"](x, x, losses, -losses, 0.5, 0.0)
    assert [value.tolist() for value in got] == [(2 * losses).tolist(), [0.0] * shape[0], [1.0] * shape[0]]
    assert [g.shape for g in ops["pairwise_cost_backward"](losses, got[2])] == [losses.shape] * 2
    for groups in (0, 1):
        mean = rstd = torch.ones((shape[0], groups) if groups else (shape[1],))
        before = build.launches()
        grad_x, *affine = ops["norm_act_backward"](x, x, None, mean, rstd, None, groups, 0.2, True)
        out_tangent, in_x, in_weight = ops["norm_act_double_backward"](x, x, x, None, mean, rstd, None, groups, 0.2)
        assert build.launches() == before
        assert grad_x.shape == out_tangent.shape == in_x.shape == shape
        for sums in (*affine, in_weight):
            assert torch.equal(sums, torch.zeros(shape[1]))


X = torch.randn(2, 3)
ROWS = torch.ones(2)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("interpolate", (X, X[:, :2], None, SEED, False), "fake: wanted the shape and strides of real"),
        ("interpolate", (X, X, None, None, False), "eps, seed: wanted exactly one of the two, got neither"),
        ("interpolate", (X, X, torch.rand(3), None, False), "eps: wanted 2 contiguous elements, got 3"),
        ("interpolate", (X, X, torch.rand(2), None, True), "per_element: wanted a seed, got eps"),
        ("interpolate", (X, X, None, SEED[:1], False), "seed: wanted a contiguous int64 CPU tensor of 2"),
        ("interpolate", (X.t(), X.t(), None, SEED, False), "real: wanted contiguous or channels_last memory"),
        ("perturb", (X.int(), None, 0.5, 0, SEED), "perturb: wanted float16, bfloat16, float32 or float64"),
        ("perturb", (X, torch.rand(2), 0.5, 0, SEED), "sigma: wanted 1 contiguous elements, got 2"),
        ("perturb", (X, None, 0.5, 2, SEED), "noise: wanted a code below 2, got 2"),
        ("grad_norm_penalty", (X, 6, 1.0, 0, 0, 0), "form: wanted a code below 6, got 6"),
        ("grad_norm_penalty", (X[0], 0, 1.0, 0, 1, 0), "grad: wanted at least 2 dimensions"),
        (
            "grad_norm_penalty_backward",
            (torch.rand(()), X, torch.rand(3), 0, 1.0, 0, 0, 0),
            "saved: wanted 2 contiguous elements, got 3",
        ),
        ("pairwise_cost", (X, X[:, :2], ROWS, ROWS, 1.0, 0.0), "fake: wanted the shape and strides of real"),
        ("pairwise_cost", (X, X, X, ROWS, 1.0, 0.0), "loss_real: wanted 2 contiguous elements, got 6"),
        ("pairwise_cost", (X, X, ROWS, ROWS.double(), 1.0, 0.0), "loss_fake: wanted the accumulation dtype"),
        ("pairwise_cost_backward", (ROWS[:1], ROWS), "grad_cost: wanted 2 contiguous elements, got 1"),
        (
            "norm_act_backward",
            (X, X, None, ROWS, ROWS, None, 2, 0.2, True),
            "groups: wanted 0 or a divisor of the 3 channels, got 2",
        ),
        (
            "norm_act_backward",
            (X, X, X.double(), ROWS, ROWS, None, 1, 0.2, True),
            "z: wanted the dtype of x",
        ),
        (
            "norm_act_backward",
            (X, X, None, ROWS, torch.ones(3), None, 1, 0.2, True),
            "rstd: wanted 2 contiguous elements, got 3",
        ),
        (
            "norm_act_double_backward",
            (X[:1], X, X, None, ROWS, ROWS, ROWS, 1, 0.2),
            "weight: wanted 3 contiguous elements, got 2",
        ),
        (
            "norm_act_double_backward",
            (X[:1], X, X, None, ROWS, ROWS, None, 1, 0.2),
            "tangent: wanted the shape and strides of x",
        ),
    ],
)
def test_arguments_are_checked(ops, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops[op](*arguments)


def run_driver(sanitizer, *arguments):
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([build.driver(sanitizer), *arguments], capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' runtimes are looked for on Linux")
@pytest.mark.parametrize(
    ("sanitizer", "fault", "report"),
    [("thread", "race", "WARNING: ThreadSanitizer: data race"), ("address", "overrun", "heap-buffer-overflow")],
)
def test_kernels_are_clean_under_the_sanitizers(sanitizer, fault, report):
    """Every kernel, its threads as threads of the machine; and the proof that the sanitizer watches."""
    result = run_driver(sanitizer)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "all kernels ran" in result.stdout
    caught = run_driver(sanitizer, fault)
    assert caught.returncode != 0
    assert report in caught.stderr
