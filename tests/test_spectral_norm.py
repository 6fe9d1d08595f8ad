"""The raw ops of spectral_norm on every backend, against the definitions in float64 and torch's own spectral norm."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import relative_error
from torch import nn

import gpkernels as gp
from gpkernels import registry
from gpkernels.ops.spectral_norm.autograd import by_layer, spectral_iterate, spectral_scale, spectral_update
from gpkernels.ops.spectral_norm.layout import pack, unpack, vectors_size

OPS = torch.ops.gpkernels
EPS = 1e-12
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Of u, v and sigma, in norm: weights are exact in any dtype, sums of thousands in float32 are not.
SUMS = {torch.float64: 1e-13, torch.float32: 8e-6, torch.bfloat16: 8e-6, torch.float16: 8e-6}
# Of results in the dtype of the weights.
ROUNDED = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [
    (1,),
    (9,),
    (1, 1),
    (7, 1),
    (1, 13),
    (33, 70),
    (16, 3, 4, 4),
    (12, 20, 3, 3),
    (5, 2, 1, 3, 2),
    (6, 3, 5, 7),
    (130, 1),
    (40, 33, 6),
]
# More than one thread does alone, in every way a block can end.
LARGE = [((300, 700), 0), ((300, 700), 1), ((2, 120000), 0), ((60, 70, 9, 7), 1), ((3, 4, 20000), 1), ((70000, 3), 0)]


def matrix(weight, dim):
    """W as torch's spectral norm lays it out."""
    others = [d for d in range(weight.dim()) if d != dim]
    return weight.permute(dim, *others).reshape(weight.shape[dim], -1)


def unmatrix(w, dim, shape):
    moved = [shape[dim], *(n for d, n in enumerate(shape) if d != dim)]
    return w.reshape(moved).movedim(0, dim)


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(n, dtype):
    return F.normalize(torch.randn(n, dtype=accumulation(dtype)), dim=0)


def draw(shape, dim, dtype=torch.float32, spike=0.0):
    """(weight, u, v), the weight with a rank-one part of `spike` times the norm of the rest."""
    w = torch.randn(shape, dtype=torch.float64)
    rows, cols = matrix(w, dim).shape
    u, v = unit(rows, torch.float64), unit(cols, torch.float64)
    w += unmatrix(spike * (rows**0.5 + cols**0.5) * torch.outer(u, v), dim, shape)
    return w.to(dtype), unit(rows, dtype), unit(cols, dtype)


def oracle(weight, u, v, dim, iterations, target, grad):
    """u, v, sigma, target W / sigma and its gradient, in float64."""
    w, g, u, v = (x.double() for x in (matrix(weight, dim), matrix(grad, dim), u, v))
    for _ in range(iterations):
        v = w.T @ u / (w.T @ u).norm()
        u = w @ v / (w @ v).norm()
    sigma = u @ w @ v
    in_w = target / sigma * (g - (g * w).sum() / sigma * torch.outer(u, v))
    shape = weight.shape
    return u, v, sigma, unmatrix(target * w / sigma, dim, shape), unmatrix(in_w, dim, shape)


def run(backend, weight, u, v, dim, iterations, target, grad, eps=EPS):
    """The raw ops of a backend, one layer; u and v are not changed. `update` is `iterate` and `forward` to the bit."""
    row = registry._rows["spectral_norm", backend]
    u, v, moved_u, moved_v = u.clone(), v.clone(), u.clone(), v.clone()
    sigma = row.iterate([weight], [u], [v], [dim], iterations, eps)
    (out,) = row.forward([weight], sigma, [target], eps)
    vectors = pack([u], [v])
    same_sigma, same_vectors, (same_out,) = row.update([weight], [moved_u], [moved_v], [dim], [target], iterations, eps)
    (copied_u,), (copied_v,) = unpack(same_vectors, [weight], [dim])
    pairs = (sigma, same_sigma), (out, same_out), (u, moved_u), (v, moved_v), (u, copied_u), (v, copied_v)
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
    (in_w,) = row.backward([grad], [weight], vectors, sigma, [dim], [target], eps)
    return u, v, sigma, out, in_w


def check(backend, device, shape, dim, dtype, iterations, target=1.5, slack=1):
    weight, u, v = (x.to(device) for x in draw(shape, dim, dtype, spike=0.5))
    grad = torch.randn(shape, device=device).to(dtype)
    got = run(backend, weight, u, v, dim, iterations, target, grad)
    for x, like in zip(got, (u, v, None, weight, weight), strict=True):
        assert x.is_contiguous()
        assert x.dtype == (accumulation(dtype) if like is None else like.dtype)
        assert x.shape == ((1,) if like is None else like.shape)
    wanted = oracle(weight, u, v, dim, iterations, target, grad)
    # without an iteration u . (W v) is a sum that cancels; what follows is compared with the sigma that came out
    size = matrix(weight.double(), dim).norm()
    assert abs(got[2] - wanted[2]) < slack * SUMS[dtype] * (size if iterations == 0 else wanted[2])
    assert relative_error(got[0], wanted[0]) < slack * SUMS[dtype]
    assert relative_error(got[1], wanted[1]) < slack * SUMS[dtype]
    sigma = got[2].double()
    factor = target / sigma if sigma > EPS else torch.full_like(sigma, target)
    limit = torch.finfo(dtype).max  # without an iteration sigma may be tiny, and float16 ends at 65504

    def limited(x):
        return x.double().clamp(-limit, limit)

    assert relative_error(limited(got[3]), limited(factor * weight.double())) < ROUNDED[dtype]
    w, g = weight.double(), grad.double()
    along = (g * w).sum() / sigma if sigma > EPS else torch.zeros_like(sigma)
    rank_one = unmatrix(torch.outer(wanted[0], wanted[1]), dim, shape)
    error = (limited(got[4]) - limited(factor * (g - along * rank_one))).norm()
    terms = g.norm() + (g.norm() * w.norm() / sigma if sigma > EPS else 0)  # before they cancel
    assert error < ROUNDED[dtype] * abs(factor) * terms


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [(s, d) for s in SHAPES for d in range(len(s))], ids=str)
def test_values(backend, device, shape, dim, dtype, iterations):
    check(backend, device, shape, dim, dtype, iterations)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), LARGE, ids=str)
def test_large_weights(backend, device, shape, dim, dtype):
    for iterations in (0, 2):
        check(backend, device, shape, dim, dtype, iterations, slack=4)  # torch's own sums of 70000 need it


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: math.prod(s) < 20000),
    dim=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    iterations=st.integers(0, 3),
    target=st.floats(0.1, 10),
    name=st.sampled_from(["reference", "cpu"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_any_shape_and_option(shape, dim, dtype, iterations, target, name, seed):
    torch.manual_seed(seed)
    if registry.why_not(name, "spectral_norm") is None:
        check(name, "cpu", tuple(shape), dim % len(shape), dtype, iterations, target)


@pytest.mark.parametrize(("shape", "dim"), [((8, 12), 0), ((4, 6, 3, 3), 1), ((10,), 0), ((1, 20), 1)], ids=str)
def test_converges_to_the_largest_singular_value(backend, device, shape, dim):
    weight, u, v = (x.to(device) for x in draw(shape, dim, torch.float64, spike=0.5))
    (sigma,) = spectral_iterate([weight], [u], [v], [dim], 100, EPS)
    torch.testing.assert_close(sigma[0], torch.linalg.svdvals(matrix(weight, dim))[0], rtol=1e-12, atol=0)
    (out,) = spectral_scale([weight], [u], [v], [sigma], [dim], [2.0], EPS)
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix(out, dim), 2).item(), 2.0)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(3, 8, 3),
        lambda: nn.ConvTranspose2d(5, 4, 3),
        lambda: nn.Linear(11, 7),
        lambda: nn.Embedding(9, 4),
        lambda: nn.Conv1d(4, 6, 3).to(torch.float64),
    ],
    ids=["conv", "transposed", "linear", "embedding", "conv1d"],
)
@pytest.mark.parametrize("iterations", [1, 3])
def test_agrees_with_torch(backend, device, layer, iterations):
    """Iterations and gradient with torch.nn.utils.spectral_norm, which begins with v as we do; reading without an
    iteration with the parametrization, which begins with u."""
    legacy = nn.utils.spectral_norm(layer().to(device), n_power_iterations=iterations)
    weight = legacy.weight_orig.detach().clone().requires_grad_()
    u, v = legacy.weight_u.clone(), legacy.weight_v.clone()
    dim = 1 if isinstance(legacy, nn.ConvTranspose2d) else 0
    for hook in legacy._forward_pre_hooks.values():
        hook(legacy, None)
    sigma = spectral_iterate([weight], [u], [v], [dim], iterations, EPS)
    (out,) = spectral_scale([weight], [u], [v], sigma, [dim], [1.0], EPS)
    upstream = torch.randn_like(out)
    torch.testing.assert_close([u, v, out], [legacy.weight_u, legacy.weight_v, legacy.weight])
    wanted = torch.autograd.grad(legacy.weight, legacy.weight_orig, upstream)
    torch.testing.assert_close(torch.autograd.grad(out, weight, upstream), wanted)

    module = nn.utils.parametrizations.spectral_norm(layer().to(device), n_power_iterations=iterations).eval()
    found = module.parametrizations.weight
    weight = found.original.detach().clone().requires_grad_()
    u, v = [found[0]._u], [found[0]._v]
    sigma = spectral_iterate([weight], u, v, [dim], 0, EPS)
    (out,) = spectral_scale([weight], u, v, sigma, [dim], [1.0], EPS)
    torch.testing.assert_close(out, module.weight)
    wanted = torch.autograd.grad(module.weight, found.original, upstream)
    torch.testing.assert_close(torch.autograd.grad(out, weight, upstream), wanted)


def test_a_vector_is_normalised(backend, device):
    """A one-dimensional weight is a matrix of one column: divided by its length, with that gradient, as torch's."""
    weight = torch.randn(13, dtype=torch.float64, device=device, requires_grad=True)
    u, v = unit(13, torch.float64).to(device), torch.ones(1, dtype=torch.float64, device=device)
    sigma = spectral_iterate([weight], [u], [v], [0], 1, EPS)
    (out,) = spectral_scale([weight], [u], [v], sigma, [0], [1.0], EPS)
    wanted = F.normalize(weight, dim=0)
    torch.testing.assert_close(out, wanted)
    upstream = torch.randn_like(out)
    grads = [torch.autograd.grad(x, weight, upstream) for x in (out, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("size", [(6, 5), (700, 300)], ids=["small", "large"])
@pytest.mark.parametrize("value", [0.0, 1e-18])
def test_zero_weight_stays_and_keeps_its_vectors(backend, device, size, value):
    weight, u, v = (x.to(device) for x in draw(size, 0))
    weight.fill_(value)
    grad = torch.randn_like(weight)
    new_u, new_v, sigma, out, in_w = run(backend, weight, u, v, 0, 2, 0.5, grad)
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)
    assert abs(sigma.item()) <= EPS
    assert torch.equal(out, 0.5 * weight)
    assert torch.equal(in_w, 0.5 * grad)


@pytest.mark.parametrize("size", [(6, 5), (700, 300)], ids=["small", "large"])
def test_nan_reaches_sigma_and_the_weight_but_not_the_vectors(backend, device, size):
    weight, u, v = (x.to(device) for x in draw(size, 0))
    weight[3, 2] = float("nan")
    new_u, new_v, sigma, out, _ = run(backend, weight, u, v, 0, 1, 1.0, torch.randn_like(weight))
    assert torch.equal(new_u, u)
    assert torch.equal(new_v, v)
    assert sigma.isnan().all()
    assert out.isnan().all()


def many(device, dtype=torch.float32):
    """Layers of every size: (weights, u, v, dims, targets, grads)."""
    shapes = [
        ((3,), 0),
        ((300, 700), 0),
        ((16, 3, 4, 4), 1),
        ((1, 1), 0),
        ((60, 70, 9, 7), 1),
        ((5, 40), 0),
        ((2, 3), 1),
    ]
    layers = [[x.to(device) for x in draw(shape, dim, dtype)] for shape, dim in shapes * 3]
    weights, u, v = ([layer[i] for layer in layers] for i in range(3))
    targets = [1.0 + i for i in range(len(layers))]
    return weights, u, v, [dim for _, dim in shapes * 3], targets, [torch.randn_like(w) for w in weights]


def run_many(row, weights, u, v, dims, targets, grads):
    u, v = [x.clone() for x in u], [x.clone() for x in v]
    sigma = row.iterate(weights, u, v, dims, 2, EPS)
    out = row.forward(weights, sigma, targets, EPS)
    return [*u, *v, *sigma.unbind(), *out, *row.backward(grads, weights, pack(u, v), sigma, dims, targets, EPS)]


def test_a_group_equals_its_layers_one_at_a_time(backend, device):
    """To the bit: sums do not depend on what else is in a call."""
    row = registry._rows["spectral_norm", backend]
    layers = many(device)
    together = run_many(row, *layers)
    alone = [run_many(row, *([x] for x in layer)) for layer in zip(*layers, strict=True)]
    assert all(
        torch.equal(a, b) for a, b in zip(together, [x for part in zip(*alone, strict=True) for x in part], strict=True)
    )


def test_same_bits_for_any_number_of_threads():
    row, layers = registry._rows["spectral_norm", "cpu"], many("cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run_many(row, *layers))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dtypes_and_layouts_are_grouped(backend, device):
    """Weights of several dtypes and memory formats in one call, each result like its weight."""
    shapes = [(4, 3, 2, 2), (5, 6), (8, 4, 3, 3), (3, 4), (6, 2)]
    kinds = [torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float64]
    layers = [draw(s, 0, d) for s, d in zip(shapes, kinds, strict=True)]
    weights, u, v = ([layer[i].to(device) for layer in layers] for i in range(3))
    weights[2] = weights[2].contiguous(memory_format=torch.channels_last)
    weights[4] = weights[4].t().contiguous().t()
    before = [x.clone() for x in u], [x.clone() for x in v]
    dims = [0] * 5
    sigma = spectral_iterate(weights, u, v, dims, 1, EPS)
    assert [tuple(s.shape) for s in sigma] == [(2,), (2,), (1,)]
    out = spectral_scale(weights, u, v, sigma, dims, [1.0] * 5, EPS)
    moved = [x.clone() for x in before[0]], [x.clone() for x in before[1]]
    for part, s in zip(spectral_update(weights, *moved, dims, [1.0] * 5, 1, EPS), sigma, strict=True):
        torch.testing.assert_close(part.sigma, s, rtol=0, atol=0)
        for i, x in zip(part.indices, part.normalised(), strict=True):
            torch.testing.assert_close(x, out[i], rtol=0, atol=0)
            assert x.stride() == out[i].stride()
    torch.testing.assert_close(moved, (u, v), rtol=0, atol=0)
    for i, s in enumerate(by_layer(weights, sigma)):
        wanted = oracle(weights[i], before[0][i], before[1][i], 0, 1, 1.0, weights[i])
        assert relative_error(u[i], wanted[0]) < 1e-6
        assert relative_error(v[i], wanted[1]) < 1e-6
        assert relative_error(s, wanted[2]) < 1e-6
        assert relative_error(out[i], wanted[3]) < ROUNDED[kinds[i]]
        assert out[i].dtype == kinds[i]
    assert out[2].is_contiguous(memory_format=torch.channels_last)


def test_autocast_rounds_nothing(backend, device):
    weight, u, v = (x.to(device) for x in draw((30, 40), 0))
    plain = run(backend, weight, u, v, 0, 1, 1.0, weight)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        sigma = spectral_iterate([weight], [u], [v], [0], 1, EPS)
    assert torch.equal(sigma[0], plain[2])
    assert torch.equal(u, plain[0])


def test_versions_move_with_the_vectors_only(backend, device):
    weight, u, v = (x.to(device) for x in draw((4, 5), 0))
    before = u._version, v._version
    spectral_iterate([weight], [u], [v], [0], 0, EPS)
    assert (u._version, v._version) == before
    spectral_iterate([weight], [u], [v], [0], 1, EPS)
    assert u._version > before[0]
    assert v._version > before[1]


def arguments(dtype=torch.float32):
    layers = [draw(shape, dim, dtype) for shape, dim in (((3, 4), 0), ((2, 5, 3), 1))]
    weights, u, v = ([layer[i] for layer in layers] for i in range(3))
    sigma = torch.rand(2, dtype=accumulation(dtype)) + 0.5
    grads = [torch.randn_like(w) for w in weights]
    return {
        "iterate": (weights, u, v, [0, 1], 1, EPS),
        "update": (weights, u, v, [torch.zeros_like(w) for w in weights], [0, 1], [1.0, 2.0], 1, EPS),
        "scale": (weights, sigma, [1.0, 2.0], EPS),
        "scale_backward": (grads, weights, pack(u, v), sigma, [0, 1], [1.0, 2.0], EPS),
    }


@pytest.mark.parametrize("name", ["iterate", "update", "scale", "scale_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(OPS, f"spectral_norm_{name}").default, arguments(dtype)[name])


@pytest.mark.parametrize("name", ["iterate", "update", "scale", "scale_backward"])
def test_raw_op_refuses_a_list_with_a_tensor_that_requires_grad(name):
    args = arguments()[name]
    args[0][1].requires_grad_()
    with pytest.raises(RuntimeError, match=f"gpkernels.spectral_norm_{name} is a raw kernel without a derivative"):
        getattr(OPS, f"spectral_norm_{name}")(*args)


W, U, V = torch.randn(3, 4), torch.ones(3), torch.ones(4)
iterate, update, scale, backward = (
    getattr(OPS, f"spectral_norm_{name}") for name in ("iterate", "update", "scale", "scale_backward")
)


@pytest.mark.skipif(registry.why_not("cpu") is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iterate([W], [], [V], [0], 1, EPS), "u: wanted one for each of the 1 weights, got 0"),
        (lambda: iterate([W], [U], [V], [2], 1, EPS), "dims: wanted a dimension of a weight of 2 dimensions, got 2"),
        (lambda: iterate([W], [U], [U], [0], 1, EPS), "v: wanted 4 contiguous elements, got 3"),
        (lambda: iterate([W], [U.double()], [V], [0], 1, EPS), "u: wanted the accumulation dtype"),
        (lambda: iterate([W.t()], [V], [U], [0], 1, EPS), "weights: wanted contiguous memory"),
        (lambda: iterate([W, W.double()], [U, U], [V, V], [0, 0], 1, EPS), "weights: wanted one dtype, got several"),
        (lambda: iterate([W[:0]], [U[:0]], [V], [0], 1, EPS), "weights: wanted no empty one"),
        (lambda: iterate([W], [U], [V], [0], -1, EPS), "iterations: wanted 0 or more, got -1"),
        (lambda: iterate([W.int()], [U], [V], [0], 1, EPS), "wanted float16, bfloat16, float32 or float64"),
        (lambda: scale([W], U, [1.0], EPS), "sigma: wanted 1 contiguous elements, got 3"),
        (lambda: scale([W], U[:1], [], EPS), "targets: wanted one for each of the 1 weights, got 0"),
        (lambda: update([W], [U], [V], [W], [0], [], 1, EPS), "targets: wanted one for each of the 1 weights, got 0"),
        (lambda: update([W], [U], [V], [W], [0], [1.0], -1, EPS), "iterations: wanted 0 or more, got -1"),
        (lambda: update([W], [U], [V], [], [0], [1.0], 1, EPS), "results: wanted one for each of the 1 weights, got 0"),
        (lambda: update([W], [U], [V], [W[:2]], [0], [1.0], 1, EPS), "results: wanted the shape and strides of"),
        (lambda: backward([W[:2]], [W], pack([U], [V]), U[:1], [0], [1.0], EPS), "grads: wanted the shape and strides"),
        (lambda: backward([W], [W], V, U[:1], [0], [1.0], EPS), "vectors: wanted 8 contiguous elements, got 4"),
        (
            lambda: backward([W], [W], pack([U], [V]).double(), U[:1], [0], [1.0], EPS),
            "vectors: wanted the accumulation",
        ),
    ],
)
def test_native_kernels_check_their_arguments(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1)), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_vectors_are_packed_for_a_gpu(sizes):
    """u and v of every layer begin at 16 bytes, and come back."""
    weights, dims = [torch.empty(a, b) for a, b, _ in sizes], [dim for *_, dim in sizes]
    u = [torch.randn(w.shape[d]) for w, d in zip(weights, dims, strict=True)]
    v = [torch.randn(w.shape[1 - d]) for w, d in zip(weights, dims, strict=True)]
    vectors = pack(u, v)
    assert vectors.shape == (vectors_size(weights, dims),)
    found = unpack(vectors, weights, dims)
    torch.testing.assert_close(found, (u, v), rtol=0, atol=0)
    assert all(x.storage_offset() % 4 == 0 for x in (*found[0], *found[1]))
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip((*found[0], *found[1]), (*u, *v), strict=True))


def test_no_layers():
    assert spectral_iterate([], [], [], [], 1, EPS) == []
    assert spectral_update([], [], [], [], [], 1, EPS) == []
    assert spectral_scale([], [], [], [], [], [], EPS) == []


def test_registry_names_the_op(backend, device):
    assert gp.why_not(backend, "spectral_norm") is None
    assert registry.choose("spectral_norm", torch.zeros(1, device=device)).backend == backend
