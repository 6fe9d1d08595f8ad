"""The Triton launchers against the reference, under TRITON_INTERPRET=1; uninitialised memory reads as NaN."""

import itertools
import sys

import torch

from gpkernels.ops.grad_penalty import reference as penalty_reference
from gpkernels.ops.grad_penalty import triton as penalty
from gpkernels.ops.interpolate import reference as interpolate_reference
from gpkernels.ops.interpolate import triton as interpolate
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


def check_launch_counts():
    from gpkernels.ops import _triton

    counted = 0
    launch = _triton.launch

    def counting(*arguments, **constants):
        nonlocal counted
        counted += 1
        launch(*arguments, **constants)

    _triton.launch = penalty.launch = counting
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
            counted = 0
            getattr(penalty, name)(*arguments, *options)
            assert 1 <= counted <= LAUNCHES[name], (name, counted)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if sys.argv[1] == "penalty":
        penalties()
        check_empty()
        check_launch_counts()
    else:
        random_numbers()
    print(f"compared {count}")
