"""The input gradient of a convolution of few channels: the kernel against autograd, and where the engine uses it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gpkernels as gp
from gpkernels.ops.conv2d_input_gradient import conv2d_input_gradient, most_channels, wins

RAW = torch.ops.gpkernels.conv2d_input_gradient
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def problem(batch, channels, outputs, size, kernel, stride, padding, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, *size, dtype=dtype)
    w = torch.randn(outputs, channels, *kernel, dtype=dtype)
    return torch.randn_like(F.conv2d(x, w, None, stride, padding)), w, x


def plain(g, w, x, stride, padding):
    """By autograd, in float64."""
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, w.double(), None, stride, padding), x, g.double())[0]


def check(g, w, x, stride, padding):
    got, wanted = RAW(g, w, x, stride, padding), plain(g, w, x, stride, padding)
    assert got.stride() == x.stride()
    assert got.dtype == x.dtype
    scale = wanted.norm() if wanted.norm() > 0 else 1
    assert (got - wanted).norm() <= (1e-14 if x.dtype == torch.float64 else 1e-6) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("channels", "outputs", "size", "kernel", "stride", "padding"),
    [
        (3, 64, (64, 64), (4, 4), (2, 2), (1, 1)),
        (1, 8, (28, 28), (5, 5), (2, 2), (2, 2)),
        (3, 16, (32, 32), (3, 3), (1, 1), (1, 1)),
        (6, 5, (9, 33), (4, 3), (2, 1), (1, 0)),
        (17, 3, (8, 8), (3, 3), (2, 2), (1, 1)),
        (64, 16, (16, 16), (4, 4), (2, 2), (1, 1)),
        (2, 4, (6, 6), (1, 1), (2, 2), (0, 0)),
        (2, 4, (4, 4), (4, 4), (1, 1), (0, 0)),
        (4, 2, (5, 7), (3, 3), (2, 2), (4, 4)),
        (3, 2, (9, 9), (2, 2), (4, 4), (0, 0)),
    ],
)
def test_native_equals_autograd(channels, outputs, size, kernel, stride, padding, dtype):
    g, w, x = problem(3, channels, outputs, size, kernel, stride, padding, dtype)
    for of_g, of_w, of_x in itertools.product(LAYOUTS, repeat=3):
        check(*(t.contiguous(memory_format=f) for t, f in ((g, of_g), (w, of_w), (x, of_x))), stride, padding)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_native_equals_autograd_for_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel, stride, padding = ((draw(1, 6), draw(1, 6)), (draw(1, 4), draw(1, 4)), (draw(0, 3), draw(0, 3)))
    size = tuple(max(1, draw(k - 2 * p, 20)) for k, p in zip(kernel, padding, strict=True))
    g, w, x = problem(draw(1, 3), draw(1, 9), draw(1, 9), size, kernel, stride, padding)
    check(g, w, x.contiguous(memory_format=data.draw(st.sampled_from(LAYOUTS))), stride, padding)


def test_native_result_does_not_depend_on_the_threads():
    g, w, x = problem(5, 3, 16, (33, 31), (4, 4), (2, 2), (1, 1), torch.float32)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(RAW(g, w, x, [2, 2], [1, 1]))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)


def test_native_empty_batch():
    g, w, x = torch.empty(0, 4, 8, 8), torch.randn(4, 3, 4, 4), torch.empty(0, 3, 16, 16)
    assert RAW(g, w, x, [2, 2], [1, 1]).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.randn(2, 4, 7, 8)}, "grad_out: wanted the size of the convolution's output, got 7"),
        ({"g": torch.randn(2, 5, 8, 8)}, "wanted one batch and one number of channels each side"),
        ({"g": torch.randn(2, 4, 8, 8).half()}, "wanted the dtype of grad_out"),
        ({"g": torch.randn(2, 4, 8, 8).mT}, "grad_out: wanted contiguous or channels_last memory"),
        ({"w": torch.randn(4, 3, 16)}, "wanted three tensors of 4 dimensions, got 4, 3 and 4"),
        ({"stride": [0, 2]}, "stride, padding: wanted at least 1 and 0, got 0 and 1"),
        ({"padding": [1]}, "stride, padding: wanted 2 numbers each, got 2 and 1"),
    ],
)
def test_native_checks_its_arguments(change, message):
    call = {
        "g": torch.randn(2, 4, 8, 8),
        "w": torch.randn(4, 3, 4, 4),
        "x": torch.randn(2, 3, 16, 16),
        "stride": [2, 2],
        "padding": [1, 1],
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        RAW(*call.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_native_schema_and_fake(layout):
    g, w, x = problem(2, 3, 4, (16, 16), (4, 4), (2, 2), (1, 1), torch.float32)
    torch.library.opcheck(RAW.default, (g, w, x.contiguous(memory_format=layout), [2, 2], [1, 1]))
    with pytest.raises(RuntimeError, match="conv2d_input_gradient is a raw kernel without a derivative"):
        RAW(g, w.requires_grad_(), x, [2, 2], [1, 1])


def test_strided_arguments_are_copied():
    g, w, x = problem(2, 3, 4, (16, 16), (4, 4), (2, 2), (1, 1))
    spread = torch.stack((x, x), -1)[..., 0]
    got = conv2d_input_gradient(
        g.expand(2, -1, -1, -1).mT.contiguous().mT, w.mT.contiguous().mT, spread, (2, 2), (1, 1)
    )
    torch.testing.assert_close(got, plain(g, w, x, (2, 2), (1, 1)))
    assert got.is_contiguous()


@torch.no_grad()
def test_taken_where_it_wins_and_no_other_backend_is_asked_for():
    g, w, x = problem(2, 3, 4, (16, 16), (4, 4), (2, 2), (1, 1), torch.float32)
    assert wins(g, w, x, (2, 2))
    assert not wins(g.half(), w.half(), x.half(), (2, 2))
    assert not wins(g.half(), w, x, (2, 2))
    assert not wins(*(t.to("meta") for t in (g, w, x)), (2, 2))
    many = torch.empty(1, most_channels(w, x, (1, 1)) + 1, 16, 16)
    assert not wins(g, w, many, (1, 1))
    assert wins(g, w, many, (2, 2))
    with gp.backend("reference"):
        assert not wins(g, w, x, (2, 2))
    with gp.backend("cpu"):
        assert wins(g, w, x, (2, 2))
    with torch.enable_grad():
        assert not wins(g, w, x, (2, 2))


def test_not_taken_under_a_transform():
    """Which would run the kernel once for each member of its batch."""
    g, w, x = problem(2, 3, 4, (8, 8), (3, 3), (1, 1), (1, 1))
    taken = []

    def look(g):
        taken.append(wins(g, w, x, (1, 1)))
        return g

    with torch.no_grad():
        look(g)
        torch.func.vmap(look)(torch.stack([g, g]))
    assert taken == [True, False]


def test_raises_instead_of_losing_a_gradient():
    g, w, x = problem(2, 3, 4, (16, 16), (4, 4), (2, 2), (1, 1))
    assert not conv2d_input_gradient(g, w, x, (2, 2), (1, 1)).requires_grad
    with pytest.raises(RuntimeError, match="conv2d_input_gradient is a raw kernel without a derivative"):
        conv2d_input_gradient(g, w.requires_grad_(), x, (2, 2), (1, 1))


@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"dilation": 2}])
def test_the_engine_takes_it_for_plain_convolutions_only(options, monkeypatch):
    """The same gradients either way, and no kernel for groups or dilation."""
    taken = []
    module = "gpkernels.double_backward.bilinear.conv2d_input_gradient"
    monkeypatch.setattr(module, lambda *args: (taken.append(1), conv2d_input_gradient(*args))[1])
    torch.manual_seed(0)
    critic = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 4, 2, 3, **options).double(), torch.nn.Flatten(), torch.nn.Softplus()
    )
    x = torch.randn(4, 3, 128, 128, dtype=torch.float64)
    gradients = []
    for backend in ("cpu", "reference"):
        with gp.backend(backend):
            loss = gp.gradient_penalty(critic, x, kind="r1")
            gradients.append(torch.autograd.grad(loss, critic.parameters()))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    assert bool(taken) == (not options)
