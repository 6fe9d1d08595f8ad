"""The Triton launchers against the reference, under TRITON_INTERPRET=1; uninitialised memory reads as NaN."""

import contextlib
import itertools
import sys
import unittest.mock

import pytest
import torch

from gpkernels.ops import _triton
from gpkernels.ops.grad_penalty import reference as penalty_reference
from gpkernels.ops.grad_penalty import triton as penalty
from gpkernels.ops.interpolate import reference as interpolate_reference
from gpkernels.ops.interpolate import triton as interpolate
from gpkernels.ops.norm_act import reference as norm_act_reference
from gpkernels.ops.norm_act import triton as norm_act
from gpkernels.ops.pairwise_cost import reference as pairwise_cost_reference
from gpkernels.ops.pairwise_cost import triton as pairwise_cost
from gpkernels.ops.perturb import reference as perturb_reference
from gpkernels.ops.perturb import triton as perturb

SHAPES = [
    (1,),
    (5,),
    (3, 1),
    (1, 1, 1, 1),
    (3, 2, 5, 7),
    (2, 3, 4, 16),
    (2, 3, 2, 4, 3),
    (1, 5003),
    (700, 3),
    (0, 3),
    (2, 0),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LAUNCHES = {"grad_norm_penalty": 2, "grad_norm_penalty_backward": 1, "grad_norm_penalty_double_backward": 3}
count = 0


def compare(got, wanted, dtype, *what):
    global count
    count += 1
    got, wanted = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, wanted))
    for g, w in zip(got, wanted, strict=True):
        tolerance = max(TOLERANCE[dtype], TOLERANCE[w.dtype])
        assert g.stride() == w.stride(), what
        torch.testing.assert_close(
            g, w, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}"
        )


def tensors():
    for dtype in DTYPES:
        for shape in SHAPES if dtype == torch.float32 else ((3, 2, 5, 7), (1, 5003)):
            x = torch.randn(shape).to(dtype)
            yield x
            if x.dim() in (4, 5) and dtype in (torch.float32, torch.float64):
                yield x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def random_numbers():
    for x in tensors():
        accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
        y, eps = torch.randn_like(x), torch.rand(len(x), dtype=accumulation)
        seed = torch.randint(-(2**63), 2**63 - 1, (2,))
        what = (x.dtype, tuple(x.shape), x.stride())
        for given, drawn, per_element in ((eps, None, False), (None, seed, False), (None, seed, True)):
            options = (given, drawn, per_element)
            compare(*(m.interpolate(x, y, *options) for m in (interpolate, interpolate_reference)), x.dtype, what)
            for need in ((True, True), (True, False), (False, True)):
                results = (m.interpolate_backward(x, *options, *need) for m in (interpolate, interpolate_reference))
                compare(*results, x.dtype, what, need)
        for noise, sigma in itertools.product((0, 1), (None, torch.rand(1, dtype=accumulation))):
            # float64 too draws its noise in float32
            close = torch.float32 if x.dtype == torch.float64 else x.dtype
            compare(*(m.perturb(x, sigma, 0.7, noise, seed) for m in (perturb, perturb_reference)), close, what)
            results = [m.perturb_backward(x, 0.7, noise, seed) for m in (perturb, perturb_reference)]
            scale = 1 + x.double().norm()
            compare(results[0] / scale, results[1] / scale, close, what)


def compare_penalty(x, *options):
    what = (x.dtype, tuple(x.shape), x.stride(), *options)
    value, saved = penalty_reference.grad_norm_penalty(x, *options)
    compare(penalty.grad_norm_penalty(x, *options), (value, saved), x.dtype, what)
    upstream, tangent = torch.rand_like(value), torch.randn_like(x)
    for name, arguments in (
        ("grad_norm_penalty_backward", (upstream, x, saved)),
        ("grad_norm_penalty_double_backward", (tangent, upstream, x, saved)),
    ):
        results = (getattr(m, name)(*arguments, *options) for m in (penalty, penalty_reference))
        compare(*results, x.dtype, what, name)


def penalties():
    every = itertools.product(range(6), (0.8,), range(3), range(3), range(3))
    for options in every:
        compare_penalty(torch.randn(2, 3, 3, 2) / 2, *options)
    for x in tensors():
        for norm, axes, reduction in itertools.product(range(3), range(3), (0, 2)):
            if x.numel() and (axes != 1 or x.dim() > 1):
                compare_penalty(x * max(1, x.numel() / max(1, len(x))) ** -0.5, 1, 0.5, norm, axes, reduction)
    zero, tied = torch.zeros(2, 3, 2), torch.tensor([[2.0, -2.0, 1.0], [0.0, 0.0, 0.0]])
    for form, target, norm, axes in itertools.product(range(6), (0.0, 1.0), range(3), range(3)):
        compare_penalty(zero, form, target, norm, axes, 0)
    for form, norm in itertools.product(range(6), range(3)):
        compare_penalty(tied, form, 2.0, norm, 0, 2)
    for bad, norm, size in itertools.product((torch.nan, -torch.nan, torch.inf, -torch.inf), range(3), (40, 5003)):
        x = torch.ones(2, size)
        x[1, size - 7] = bad
        for axes in range(3):
            options = (4, 0.0, norm, axes, 2)
            results = (m.grad_norm_penalty(x, *options) for m in (penalty, penalty_reference))
            compare(*results, x.dtype, bad, options)


def check_empty():
    for shape, norm, reduction in itertools.product(((0, 3), (2, 0)), range(3), range(3)):
        x = torch.zeros(shape)
        options = (0, 1.0, norm, 0, reduction)
        value, saved = penalty.grad_norm_penalty(x, *options)
        ones = torch.ones(shape[0])
        torch.testing.assert_close(value, (ones.mean, ones.sum, ones.clone)[reduction](), equal_nan=True)
        assert torch.equal(saved, torch.zeros(2 if norm == 2 else 1, shape[0]))
        assert penalty.grad_norm_penalty_backward(value, x, saved, *options).shape == shape
        second = penalty.grad_norm_penalty_double_backward(x, value, x, saved, *options)
        assert torch.equal(second[1], torch.zeros_like(value))


@contextlib.contextmanager
def recorded_launches(module, run=True):
    """The numbers of programs of the launches inside the block."""
    programs, launch = [], module.launch

    def record(kernel, number, *arguments, **constants):
        programs.append(number)
        if run:
            launch(kernel, number, *arguments, **constants)

    with unittest.mock.patch.object(module, "launch", record):
        yield programs


def check_launch_counts():
    for shape, axes, reduction in itertools.product(((2, 3, 5, 7), (2, 5003), (300, 3)), range(3), (0, 2)):
        x = torch.randn(shape)
        options = (0, 1.0, 0, axes, reduction)
        value, saved = penalty_reference.grad_norm_penalty(x, *options)
        inputs = {
            "grad_norm_penalty": (x,),
            "grad_norm_penalty_backward": (value, x, saved),
            "grad_norm_penalty_double_backward": (x, value, x, saved),
        }
        for name, arguments in inputs.items():
            with recorded_launches(_triton) as shared, recorded_launches(penalty) as own:
                getattr(penalty, name)(*arguments, *options)
            assert 1 <= len(shared) + len(own) <= LAUNCHES[name], (name, shared, own)


def compare_pairwise_cost(real, fake, most, *options):
    """`most` launches."""
    what = (real.dtype, tuple(real.shape), real.stride(), *options)
    dtype = torch.float64 if real.dtype == torch.float64 else torch.float32
    losses = [torch.randn(len(real), dtype=dtype) for _ in range(2)]
    with recorded_launches(pairwise_cost) as programs:
        got = pairwise_cost.pairwise_cost(real, fake, *losses, *options)
    wanted = pairwise_cost_reference.pairwise_cost(real, fake, *losses, *options)
    compare(got, wanted, dtype, what)
    assert len(programs) == most, (what, programs)
    arguments = (losses[0], wanted[2])
    with recorded_launches(pairwise_cost) as programs:
        got = pairwise_cost.pairwise_cost_backward(*arguments)
    compare(got, pairwise_cost_reference.pairwise_cost_backward(*arguments), dtype, what)
    assert len(programs) == (len(real) > 0), what


def pairwise_costs():
    for x, slope in zip(tensors(), itertools.cycle((0.0, 1.0, -2.0, 0.3)), strict=False):
        elements = x.numel() // max(1, len(x))
        launches = 0 if x.numel() == 0 else 1 + (elements > 2048)
        compare_pairwise_cost(x, torch.randn_like(x), launches, 0.7 / max(1, elements), slope)
    compare_pairwise_cost(torch.ones(3, 5), torch.ones(3, 5), 1, 0.0, 0.3)
    for bad, size in itertools.product((torch.nan, torch.inf, -torch.inf), (40, 5003)):
        x = torch.ones(2, size)
        x[1, size - 7] = bad
        compare_pairwise_cost(x, torch.zeros_like(x), 1 + (size > 2048), 0.1, -1.0)
    with unittest.mock.patch.object(_triton, "PROGRAMS", 2):  # programs of several steps, with a split and without
        for batch in (1, 2):
            compare_pairwise_cost(torch.randn(batch, 5003), torch.randn(batch, 5003), 3 - batch, 1e-4, 0.0)
    x, losses = torch.empty((1024, 2050), device="meta"), torch.empty(1024, device="meta")
    with recorded_launches(pairwise_cost, run=False) as programs:
        pairwise_cost.pairwise_cost(x, x, losses, losses, 0.1, 0.0)
    assert programs == [1024]
    shapes = {(64, 3, 64, 64): 384, (64, 3, 256, 256): 1024, (1, 3, 256, 256): 96, (2, 1 << 30): 1024}
    for shape, least in shapes.items():
        x, losses = torch.empty(shape, device="meta"), torch.empty(shape[0], device="meta")
        with recorded_launches(pairwise_cost, run=False) as programs:
            pairwise_cost.pairwise_cost(x, x, losses, losses, 0.1, 0.0)
        assert programs[0] >= least, (shape, programs)
        assert len(programs) == 2, (shape, programs)


def norm_act_inputs(x, groups, z=True, weight=True, slope=0.2):
    """The arguments that both derivatives share."""
    mean, rstd = norm_act_reference.statistics(x, groups, 1e-5)
    gamma = torch.randn(x.shape[1]).to(mean.dtype) if weight else None
    if weight:
        gamma[0] = 0
    return torch.randn_like(x), x, torch.randn_like(x) if z else None, mean, rstd, gamma, groups, slope


def compare_norm_act(x, groups, affine=(True, False), most=3, **options):
    """`most` launches, and one less where no program shares a channel with another."""
    what = (x.dtype, tuple(x.shape), x.stride(), groups, options)
    inputs = norm_act_inputs(x, groups, **options)
    for name, arguments, shares in (
        ("norm_act_double_backward", (torch.randn_like(x), *inputs), groups > 0),
        *(("norm_act_backward", (*inputs, need), groups > 0 and need) for need in affine),
    ):
        with recorded_launches(norm_act) as programs:
            got = getattr(norm_act, name)(*arguments)
        compare(got, getattr(norm_act_reference, name)(*arguments), x.dtype, what, name)
        assert 1 <= len(programs) <= most - 1 + shares, (what, name, programs)


def layouts(x):
    yield x
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def small_tiles(programs):
    """Inside the block norm_act has tiles of 64 elements and splits long groups until there are `programs`."""
    norm_act._tiling.cache_clear()
    with unittest.mock.patch.multiple(norm_act, TILE=64, PROGRAMS=programs, _LARGEST=128, _RUN=16):
        yield
    norm_act._tiling.cache_clear()


def norm_acts():
    """Every option where a tile holds the groups whole; then, groups that one program or several walk in tiles."""
    activations = ({"z": False}, {"slope": 0.0}, {"slope": 0.2})
    small = [*layouts(torch.randn(3, 4, 5, 3)), torch.randn(5, 4)]
    for x, groups, activation, weight in itertools.product(small, (0, 1, 2, 4), activations, (True, False)):
        compare_norm_act(x, groups, (weight,), most=2, weight=weight, **activation)
    for programs in (3, 64):
        with small_tiles(programs):
            for x in (*layouts(torch.randn(2, 4, 3, 7)), torch.randn(5, 36)):
                for groups in (0, 1, 2, x.shape[1]):
                    compare_norm_act(x, groups, (True,))
            compare_norm_act(torch.randn(1, 2, 150), 1, (False,), z=False, weight=False)
            compare_norm_act(torch.randn(400, 3), 0, (False,), z=False, weight=False)
            compare_norm_act(torch.randn(90, 4), 1, (True,))
    compare_norm_act(torch.randn(1, 5003), 1, (True,))
    compare_norm_act(torch.randn(5003, 3), 0, (True,))
    for x in (torch.randn(1, 2, 5003), *layouts(torch.randn(2, 4, 41, 41))):
        for groups in (0, 1, x.shape[1]):
            compare_norm_act(x, groups, (True,))
    odd = ((3, 6, 5, 7), 2), ((2, 70, 3, 3), 70), ((2, 1, 1, 1), 1), ((70, 9), 3), ((2, 4, 2, 3, 2), 2)
    for (shape, groups), dtype in itertools.product(odd, DTYPES):
        compare_norm_act(torch.randn(shape).to(dtype), groups, (True,))


def check_norm_act():
    """Inputs that stand out: constant groups, NaN, nothing at all, vectors of the wrong dtype."""
    x = torch.ones(2, 4, 3)
    x[1] = torch.randn(4, 3)
    for groups in (0, 1, 4):
        compare_norm_act(x, groups)
        inputs = list(norm_act_inputs(torch.randn(2, 4, 3), groups))
        inputs[0][1, 2, 1] = inputs[2][0, 1, 2] = torch.nan
        results = (m.norm_act_double_backward(x, *inputs) for m in (norm_act, norm_act_reference))
        compare(*results, x.dtype, "nan", groups)
        for shape in ((0, 4, 3), (2, 4, 0)):
            empty, statistic = torch.zeros(shape), torch.zeros((shape[0], groups) if groups else 4)
            inputs = (empty, empty, empty, statistic, statistic, None, groups, 0.2)
            with recorded_launches(norm_act) as programs:
                second = norm_act.norm_act_double_backward(empty, *inputs)
                first = norm_act.norm_act_backward(*inputs, True)
            assert not programs
            assert second[0].shape == second[1].shape == first[0].shape == shape
            assert torch.equal(torch.stack((second[2], *first[1:])), torch.zeros(3, 4))
    inputs = list(norm_act_inputs(x, 1))
    inputs[5] = inputs[5].bfloat16()
    with pytest.raises(ValueError, match=r"weight: wanted 4 contiguous elements of torch.float32, got \(4,\) of"):
        norm_act.norm_act_backward(*inputs, False)


def check_norm_act_programs():
    """Long groups, and few, fill a GPU of 132 multiprocessors; many small groups share programs."""
    large = ((64, 64, 256, 256), 0), ((64, 3, 256, 256), 0), ((64, 16, 64, 64), 0), ((1, 64, 256, 256), 64)
    for shape, groups in (*large, ((2, 64, 256, 256), 8), ((1, 1 << 22), 1), ((64, 1 << 22), 1), ((1 << 16, 8), 0)):
        for x in layouts(torch.empty(shape, device="meta")):
            assert min(norm_act_programs(x, groups)) >= 128, (shape, groups)
    for x in layouts(torch.empty(64, 512, 4, 4, device="meta")):
        assert norm_act_programs(x, 512)[0] == x.numel() // 1024


def norm_act_programs(x, groups):
    """The programs of every launch of the second derivative but the one that adds up rows."""
    statistic = x.new_empty((len(x), groups) if groups else x.shape[1], dtype=torch.float32)
    with recorded_launches(norm_act, run=False) as programs:
        norm_act.norm_act_double_backward(x, x, x, x, statistic, statistic, None, groups, 0.2)
    return programs[: 1 if len(programs) == 1 else 2]


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if sys.argv[1] == "penalty":
        penalties()
        check_empty()
        check_launch_counts()
    elif sys.argv[1] == "pairwise_cost":
        pairwise_costs()
    elif sys.argv[1] == "norm_act":
        norm_acts()
        check_norm_act()
        check_norm_act_programs()
    else:
        random_numbers()
    print(f"compared {count}")
