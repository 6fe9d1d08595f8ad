"""The CUDA kernels of spectral_norm without a GPU: their device code executed on the host (tests/shim).

What this cannot show is their speed and how they behave on a device.
"""

import itertools

import pytest
import torch
from shim import build

from gpkernels.ops.spectral_norm import reference
from gpkernels.ops.spectral_norm.layout import pack, unpack

EPS = 1e-12
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = tuple(TOLERANCE)

# shape and dim of a layer
LAYERS = [
    ((64, 3, 4, 4), 0),
    ((128, 16, 3, 3), 0),
    ((40, 100), 0),  # rows and columns split
    ((70, 1100), 0),
    ((1, 520), 0),
    ((600, 3), 0),  # columns that are no unit
    ((5, 7), 1),  # the transpose lies in memory
    ((130, 1040), 1),
    ((12, 80, 4, 4), 1),  # units of several panels
    ((3, 50, 3, 3), 1),
    ((2, 3, 4, 5), 3),
    ((2, 3, 40, 5), 2),
    ((9,), 0),
    ((1, 1), 0),
]


@pytest.fixture(scope="module")
def ops():
    return build.load()


def unaligned(x):
    """The same values one element into a larger allocation."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].copy_(x.reshape(-1)).view(x.shape)


def draw(layers, dtype, place=torch.clone):
    """(weights, u, v, dims) of layers."""
    accumulation = torch.promote_types(dtype, torch.float32)
    weights = [place(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape, _ in layers]
    u, v = [], []
    for weight, (shape, dim) in zip(weights, layers, strict=True):
        for vectors, length in ((u, shape[dim]), (v, weight.numel() // shape[dim])):
            x = torch.nn.functional.normalize(torch.randn(length, dtype=torch.float64), dim=0)
            vectors.append(place(x.to(accumulation)))
    return weights, u, v, [dim for _, dim in layers]


def doubles(*groups):
    return [[x.double().clone() for x in group] for group in groups]


def close(got, wanted, tolerance, what):
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        text = f"{what} layer {index}"
        assert one.shape == other.shape, text
        torch.testing.assert_close(
            one.double(), other.double(), rtol=tolerance, atol=tolerance, msg=lambda m, text=text: f"{text}\n{m}"
        )


def counted(call, *arguments):
    before = build.launches()
    return call(*arguments), build.launches() - before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [torch.clone, unaligned], ids=["aligned", "unaligned"])
def test_iterate(ops, dtype, place):
    for iterations in (0, 1, 3):
        weights, u, v, dims = draw(LAYERS, dtype, place)
        exact = doubles(weights, u, v)
        sigma, launches = counted(ops["spectral_norm_iterate"], weights, u, v, dims, iterations, EPS)
        assert launches == (3 * iterations or 2)
        wanted = reference.spectral_norm_iterate(*exact, dims, iterations, EPS)
        assert sigma.dtype == u[0].dtype
        tolerance = 20 * TOLERANCE[u[0].dtype]  # of sums that cancel, then divided by their norm
        scale = max(1.0, wanted.abs().max().item())
        close(sigma / scale, wanted / scale, tolerance, f"sigma after {iterations}")
        close(u, exact[1], tolerance, f"u after {iterations}")
        close(v, exact[2], tolerance, f"v after {iterations}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_is_iterate_and_scale_to_the_bit(ops, dtype):
    """One launch more than the iterations, which copy u and v."""
    for iterations in (0, 1, 3):
        many = [((3 + i % 5, 4 + i % 7), i % 2) for i in range(60)] if iterations == 3 else []  # two rounds of launches
        weights, u, v, dims = draw([*LAYERS, *many, ((40, 48), 0)], dtype, torch.clone)
        weights[-1].zero_()  # moves nothing
        moved = [x.clone() for x in u], [x.clone() for x in v]
        targets = [1.0 + 0.5 * (i % 3) for i in range(len(weights))]
        results = [torch.full_like(w, torch.nan) for w in weights]
        arguments = (weights, *moved, results, dims, targets, iterations, EPS)
        (sigma, vectors), launches = counted(ops["spectral_norm_update"], *arguments)
        assert launches == ((3 * iterations or 2) + 1) * (1 + (len(weights) > 64))
        wanted = ops["spectral_norm_iterate"](weights, u, v, dims, iterations, EPS)
        assert torch.equal(sigma, wanted)
        copies = unpack(vectors, weights, dims)
        for found in (moved, copies):
            assert all(map(torch.equal, (*found[0], *found[1]), (*u, *v)))
        assert all(map(torch.equal, results, ops["spectral_norm_scale"](weights, sigma, targets, EPS)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [torch.clone, unaligned], ids=["aligned", "unaligned"])
def test_scale_and_its_gradient(ops, dtype, place):
    weights, u, v, dims = draw([*LAYERS, ((80, 300), 0)], dtype, place)
    targets = [1.0 + 0.5 * (i % 3) for i in range(len(weights))]
    sigma = torch.rand(len(weights), dtype=u[0].dtype) + 1
    sigma[2] = 0.0
    sigma[3] = EPS / 2
    got, launches = counted(ops["spectral_norm_scale"], weights, sigma, targets, EPS)
    assert launches == 1
    exact = doubles(weights, u, v)
    wanted = reference.spectral_norm_scale(exact[0], sigma.double(), targets, EPS)
    close(got, wanted, 2 * TOLERANCE[dtype], "scale")
    assert all(one.dtype == dtype for one in got)

    grads = [place(torch.randn_like(w)) for w in weights]
    vectors = place(pack(u, v))
    arguments = (weights, vectors, sigma, dims, targets, EPS)
    got, launches = counted(ops["spectral_norm_scale_backward"], grads, *arguments)
    assert launches == 2
    exact = doubles(grads, weights)
    wanted = reference.spectral_norm_scale_backward(*exact, vectors.double(), sigma.double(), dims, targets, EPS)
    close(got, wanted, 4 * TOLERANCE[dtype], "backward")
    assert all(one.dtype == dtype for one in got)


def test_layers_too_large_for_a_tile(ops):
    """Many parts of rows, of columns and of the dot product."""
    for layers in ([((3000, 70), 0)], [((20, 20_001), 0)], [((1900, 1200), 0), ((70, 2100), 1)]):
        weights, u, v, dims = draw(layers, torch.float32)
        exact = doubles(weights, u, v)
        sigma = ops["spectral_norm_iterate"](weights, u, v, dims, 1, EPS)
        wanted = reference.spectral_norm_iterate(*exact, dims, 1, EPS)
        close(sigma / wanted.max(), wanted / wanted.max(), 1e-5, "sigma")
        close(u, exact[1], 1e-5, "u")
        close(v, exact[2], 1e-5, "v")
        grads = [torch.randn_like(w) for w in weights]
        vectors, targets = pack(u, v), [1.0] * len(dims)
        got = ops["spectral_norm_scale_backward"](grads, weights, vectors, sigma, dims, targets, EPS)
        exact = *doubles(grads, weights), vectors.double()
        close(got, reference.spectral_norm_scale_backward(*exact, wanted, dims, targets, EPS), 1e-5, "grad")


def test_more_layers_than_a_launch_takes(ops):
    """Of 64 layers each: 65 take a second round of launches."""
    for count, rounds in ((64, 1), (65, 2)):
        layers = [((3 + i % 5, 4 + i % 7), i % 2) for i in range(count)]
        weights, u, v, dims = draw(layers, torch.float32)
        exact = doubles(weights, u, v)
        sigma, launches = counted(ops["spectral_norm_iterate"], weights, u, v, dims, 1, EPS)
        assert launches == 3 * rounds
        close(sigma, reference.spectral_norm_iterate(*exact, dims, 1, EPS), 1e-5, "sigma")
        close(u, exact[1], 1e-5, "u")
        targets = [float(i) for i in range(count)]
        got, launches = counted(ops["spectral_norm_scale"], weights, sigma, targets, EPS)
        assert launches == rounds
        close(got, reference.spectral_norm_scale(weights, sigma, targets, EPS), 1e-5, "scale")
        grads = [torch.randn_like(w) for w in weights]
        arguments = (grads, weights, pack(u, v), sigma, dims, targets, EPS)
        got, launches = counted(ops["spectral_norm_scale_backward"], *arguments)
        assert launches == 2 * rounds
        close(got, reference.spectral_norm_scale_backward(*arguments), 1e-4, "backward")


@pytest.mark.parametrize("dim", [0, 1])
def test_weights_that_give_no_direction(ops, dim):
    """Zero, NaN, u across the range of W: what has no direction stays, as in the reference."""
    weights, u, v, dims = draw([((40, 48), dim)] * 5, torch.float32)
    weights[0].zero_()
    weights[1][3, 5] = float("nan")
    across = weights[2] if dim == 0 else weights[2].t()
    across[7], u[2][:] = 0.0, 0.0
    u[2][7] = 1.0  # W^T u = 0: v stays, and u follows it
    v[3].zero_()
    weights[4].fill_(1e-14)
    exact = doubles(weights, u, v)
    before = [x.clone() for x in (u[0], v[0], u[1], v[1], v[2], u[4], v[4])]
    sigma = ops["spectral_norm_iterate"](weights, u, v, dims, 1, EPS)
    assert all(map(torch.equal, before, (u[0], v[0], u[1], v[1], v[2], u[4], v[4])))
    wanted = reference.spectral_norm_iterate(*exact, dims, 1, EPS)
    assert sigma[0] == 0
    assert sigma[1].isnan()
    assert sigma[2] > 0.1
    torch.testing.assert_close(sigma.double(), wanted, rtol=1e-5, atol=1e-12, equal_nan=True)
    close(u, exact[1], 1e-5, "u")
    close(v, exact[2], 1e-5, "v")


def test_sums_are_the_same_at_every_call(ops):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        weights, u, v, dims = draw([((300, 1100), 0), ((64, 90, 4, 4), 1)], torch.float32)
        sigma = ops["spectral_norm_iterate"](weights, u, v, dims, 2, EPS)
        results.append([sigma, *u, *v])
    assert all(map(torch.equal, *results))


W, U, V, SIGMA = torch.randn(3, 4), torch.randn(3), torch.randn(4), torch.ones(1)
UV = pack([U], [V])


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("iterate", ([W], [U], [V], [2], 1, EPS), "dims: wanted a dimension of a weight of 2 dimensions, got 2"),
        ("iterate", ([W], [V], [V], [0], 1, EPS), "u: wanted 3 contiguous elements, got 4"),
        ("iterate", ([W], [U], [V.double()], [0], 1, EPS), "v: wanted the accumulation dtype"),
        ("iterate", ([W], [U], [V], [0, 0], 1, EPS), "dims: wanted one for each of the 1 weights, got 2"),
        ("iterate", ([W], [U], [V], [0], -1, EPS), "iterations: wanted at least 0, got -1"),
        ("iterate", ([W.t()], [V], [U], [0], 1, EPS), "weights: wanted contiguous memory"),
        ("iterate", ([W, W.double()], [U] * 2, [V] * 2, [0] * 2, 1, EPS), "weights: wanted one dtype, got several"),
        ("iterate", ([W[:, :0]], [U], [V[:0]], [0], 1, EPS), "weights: wanted no empty one, got one without"),
        ("iterate", ([W.int()], [U], [V], [0], 1, EPS), "wanted float16, bfloat16, float32 or float64"),
        ("update", ([W], [U], [V], [], [0], [1.0], 1, EPS), "results: wanted one for each of the 1 weights, got 0"),
        ("update", ([W], [U], [V], [W.t()], [0], [1.0], 1, EPS), "results: wanted the shape and strides"),
        ("update", ([W], [U], [V], [W], [0], [], 1, EPS), "targets: wanted one for each of the 1 weights, got 0"),
        ("scale", ([W], torch.ones(2), [1.0], EPS), "sigma: wanted 1 contiguous elements, got 2"),
        ("scale", ([W[:0]], SIGMA, [1.0], EPS), "weights: wanted no empty one, got one without"),
        ("scale", ([W], SIGMA, [], EPS), "targets: wanted one for each of the 1 weights, got 0"),
        ("scale_backward", ([W.t()], [W], UV, SIGMA, [0], [1.0], EPS), "grads: wanted the shape and strides"),
        ("scale_backward", ([], [W], UV, SIGMA, [0], [1.0], EPS), "grads: wanted one for each of the 1 weights"),
        ("scale_backward", ([W], [W], UV[:7], SIGMA, [0], [1.0], EPS), "vectors: wanted 8 contiguous elements, got 7"),
    ],
)
def test_arguments_are_checked(ops, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops[f"spectral_norm_{op}"](*arguments)


def test_every_pair_of_options_is_drawn():
    """The layers above have every way through memory in every dtype: swapped or not, in units or one by one."""
    for dtype, swapped in itertools.product(DTYPES, (False, True)):
        unit = 8 if dtype.itemsize == 2 else 4
        inner = [torch.Size(shape[dim + 1 :]).numel() for shape, dim in LAYERS]
        of_walk = [
            shape[dim] if n == 1 else n for (shape, dim), n in zip(LAYERS, inner, strict=True) if (n == 1) == swapped
        ]
        assert {n % unit == 0 for n in of_walk} == {True, False}
