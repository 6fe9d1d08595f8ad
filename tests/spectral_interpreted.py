"""spectral_norm's Triton launchers against the reference, under TRITON_INTERPRET=1; uninitialised memory reads as
NaN."""

import itertools
import unittest.mock

import pytest
import torch
from triton_interpreted import recorded_launches

from gpkernels.ops.spectral_norm import reference
from gpkernels.ops.spectral_norm import triton as spectral
from gpkernels.ops.spectral_norm.layout import pack, unpack

EPS = 1e-12
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LAYERS = [  # shape and dim
    ((20, 3, 4, 4), 0),
    ((70, 16, 3, 3), 0),
    ((1, 520), 0),
    ((100, 3), 0),
    ((5, 7), 1),
    ((40, 272), 1),
    ((12, 20, 4, 4), 1),
    ((3, 50, 3, 3), 1),
    ((2, 3, 4, 5), 3),
    ((9,), 0),
    ((1, 1), 0),
]
compared = 0


def unaligned(x):
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].copy_(x.reshape(-1)).view(x.shape)


def draw(layers, dtype, place=torch.clone):
    accumulation = torch.promote_types(dtype, torch.float32)
    weights = [place(torch.randn(shape).to(dtype)) for shape, _ in layers]
    rows = [shape[dim] for shape, dim in layers]
    vectors = [
        [place(torch.nn.functional.normalize(torch.randn(n), dim=0).to(accumulation)) for n in lengths]
        for lengths in (rows, [w.numel() // n for w, n in zip(weights, rows, strict=True)])
    ]
    return weights, *vectors, [dim for _, dim in layers]


def close(got, wanted, tolerance, what):
    global compared
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        compared += 1
        torch.testing.assert_close(
            one.double(),
            other.double(),
            rtol=tolerance,
            atol=tolerance * max(1.0, other.abs().max().item()),
            equal_nan=True,
            msg=lambda text, index=index: f"{what}, layer {index}: {text}",
        )


def doubles(*groups):
    return [[x.double().clone() for x in group] for group in groups]


def compare_iterate(layers, dtype, iterations, place=torch.clone, most=3):
    weights, u, v, dims = draw(layers, dtype, place)
    exact = doubles(weights, u, v)
    with recorded_launches(spectral) as programs:
        sigma = spectral.spectral_norm_iterate(weights, u, v, dims, iterations, EPS)
    assert len(programs) == (most * iterations or 2)
    wanted = reference.spectral_norm_iterate(*exact, dims, iterations, EPS)
    assert sigma.dtype == u[0].dtype
    for name, got, right in (("sigma", sigma, wanted), ("u", u, exact[1]), ("v", v, exact[2])):
        close(got, right, TOLERANCE[sigma.dtype], (name, dtype, iterations, place.__name__))


def compare_update(layers, dtype, iterations, rounds=1):
    """As iterate and scale, to the bit, in one launch more than the former."""
    weights, u, v, dims = draw([*layers, ((20, 24), 0)], dtype, torch.clone)
    weights[-1].zero_()  # moves nothing
    moved = [x.clone() for x in u], [x.clone() for x in v]
    targets = [1.0 + 0.5 * (i % 3) for i in range(len(weights))]
    results = [torch.full_like(w, torch.nan) for w in weights]
    with recorded_launches(spectral) as programs:
        sigma, vectors = spectral.spectral_norm_update(weights, *moved, results, dims, targets, iterations, EPS)
    assert len(programs) == ((3 * iterations or 2) + 1) * rounds
    assert torch.equal(sigma, spectral.spectral_norm_iterate(weights, u, v, dims, iterations, EPS))
    for found in (moved, unpack(vectors, weights, dims)):
        assert all(map(torch.equal, (*found[0], *found[1]), (*u, *v)))
    assert all(map(torch.equal, results, spectral.spectral_norm_scale(weights, sigma, targets, EPS)))


def compare_scale(layers, dtype, place=torch.clone, rounds=1):
    weights, u, v, dims = draw(layers, dtype, place)
    targets = [1.0 + 0.5 * (i % 3) for i in range(len(weights))]
    sigma = torch.rand(len(weights), dtype=u[0].dtype) + 1
    sigma[0], sigma[-1] = 0.0, EPS / 2
    with recorded_launches(spectral) as programs:
        got = spectral.spectral_norm_scale(weights, sigma, targets, EPS)
    assert len(programs) == rounds
    exact = doubles(weights, u, v)
    what = (dtype, place.__name__)
    close(got, reference.spectral_norm_scale(exact[0], sigma.double(), targets, EPS), TOLERANCE[dtype], what)
    assert all(one.dtype == dtype for one in got)
    grads = [place(torch.randn_like(w)) for w in weights]
    vectors = place(pack(u, v))
    with recorded_launches(spectral) as programs:
        got = spectral.spectral_norm_scale_backward(grads, weights, vectors, sigma, dims, targets, EPS)
    assert len(programs) == 2 * rounds
    exact = doubles(grads, weights)
    wanted = reference.spectral_norm_scale_backward(*exact, vectors.double(), sigma.double(), dims, targets, EPS)
    close(got, wanted, TOLERANCE[dtype], what)
    assert all(one.dtype == dtype for one in got)


def no_direction():
    """Zero, NaN, u across the range of W: what has no direction stays, as in the reference."""
    for dim in (0, 1):
        weights, u, v, dims = draw([((20, 24), dim)] * 3, torch.float32)
        weights[0].zero_()
        weights[1][3, 5] = torch.nan
        across = weights[2] if dim == 0 else weights[2].t()
        across[7], u[2][:] = 0.0, 0.0
        u[2][7] = 1.0
        exact = doubles(weights, u, v)
        before = [x.clone() for x in (u[0], v[0], u[1], v[1], v[2])]
        sigma = spectral.spectral_norm_iterate(weights, u, v, dims, 1, EPS)
        assert all(map(torch.equal, before, (u[0], v[0], u[1], v[1], v[2])))
        close([sigma, *u, *v], [reference.spectral_norm_iterate(*exact, dims, 1, EPS), *exact[1], *exact[2]], 1e-5, dim)
        assert sigma[0] == 0
        assert sigma[2] > 0.1


def more_layers_than_a_launch_takes():
    layers = [((2 + i % 3, 3 + i % 4), i % 2) for i in range(5)]
    with unittest.mock.patch.object(spectral, "LAYERS", 4):
        compare_iterate(layers, torch.float32, 1, most=6)
        compare_scale(layers, torch.float32, rounds=2)
        compare_update(layers, torch.float32, 1, rounds=2)


def many_parts():
    """Several tiles of rows and of columns; more parts than are added up at a time."""
    layers = [((150, 1100), 0), ((150, 600), 1), ((3, 5003), 0), ((1200, 7), 0)]
    compare_iterate(layers, torch.float32, 1)
    compare_scale(layers, torch.float32)


def bad_arguments():
    w, u, v, sigma = torch.randn(3, 4), torch.randn(3), torch.randn(4), torch.ones(1)
    before = u.clone(), v.clone()
    for call, message in (
        (lambda: spectral.spectral_norm_iterate([], [], [], [], 1, EPS), "weights: wanted at least one, got none"),
        (lambda: spectral.spectral_norm_iterate([w], [v], [v], [0], 1, EPS), "u: wanted 3 contiguous elements of"),
        (lambda: spectral.spectral_norm_iterate([w], [u], [v.double()], [0], 1, EPS), "v: wanted 4 contiguous"),
        (lambda: spectral.spectral_norm_iterate([w.t()], [v], [u], [0], 1, EPS), "weights: wanted 12 contiguous"),
        (lambda: spectral.spectral_norm_iterate([w[:0]], [u[:0]], [v], [0], 1, EPS), "weights: wanted no empty one"),
        (lambda: spectral.spectral_norm_scale([w], sigma, [], EPS), "targets: wanted 1 numbers, got 0"),
        (
            lambda: spectral.spectral_norm_update([w], [u], [v], [w], [0], [], 1, EPS),
            "targets: wanted 1 numbers, got 0",
        ),
        (
            lambda: spectral.spectral_norm_update([w], [u], [v], [v], [0], [1.0], 1, EPS),
            "results: wanted 12 contiguous",
        ),
        (lambda: spectral.spectral_norm_scale([w], u, [1.0], EPS), "sigma: wanted 1 contiguous elements"),
        (
            lambda: spectral.spectral_norm_scale_backward([w], [w], v, sigma, [0], [1.0], EPS),
            "vectors: wanted 8 contiguous elements",
        ),
        (
            lambda: spectral.spectral_norm_scale_backward([w], [w], v, sigma, [], [1.0], EPS),
            "dims: wanted 1 dimensions, got 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(u, before[0])
    assert torch.equal(v, before[1])
    assert spectral.spectral_norm_scale([], sigma[:0], [], EPS) == []


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for dtype, place in itertools.product(TOLERANCE, (torch.clone, unaligned)):
        if place is torch.clone or dtype in (torch.float32, torch.bfloat16):
            for iterations in (0, 1, 2) if dtype == torch.float32 else (1,):
                compare_iterate(LAYERS, dtype, iterations, place)
            compare_scale(LAYERS, dtype, place)
    for dtype in TOLERANCE:
        compare_update(LAYERS, dtype, 1)
    compare_update(LAYERS, torch.float32, 0)
    no_direction()
    more_layers_than_a_launch_takes()
    many_parts()
    bad_arguments()
    print(f"compared {compared}")
