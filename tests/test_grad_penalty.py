"""grad_norm and grad_norm_penalty: every form x norm x axes x reduction, on every backend."""

import itertools

import oracles
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gpkernels as gp
from gpkernels.ops.grad_penalty import penalties

FORMS = tuple(penalties.PENALTIES)
NORMS = ("l2", "l1", "linf")
AXES = ("sample", "pixel", "batch")
REDUCTIONS = ("mean", "sum", "none")
SHAPES = [(5, 1), (1, 3), (2, 3, 1, 1), (3, 2, 5, 7), (2, 3, 2, 4, 3), (2, 1, 150, 131), (2, 3, 24, 25), (4, 20, 6)]
OPTIONS = list(itertools.product(FORMS, NORMS, AXES, REDUCTIONS))
NAMES = ("form", "norm", "axes", "reduction")


def scaled(shape, axes, **kwargs):
    """A gradient whose norms lie on both sides of the target 1."""
    grad = torch.randn(shape, **kwargs)
    return grad * (1.3 / oracles.norms(grad.double(), "l2", axes).mean().item())


@pytest.mark.parametrize(NAMES, OPTIONS)
def test_value(backend, device, form, norm, axes, reduction):
    for shape in SHAPES:
        grad = scaled(shape, axes, device=device)
        got = gp.grad_norm_penalty(grad, form=form, norm=norm, axes=axes, reduction=reduction)
        wanted = oracles.penalty(grad.double(), form, 1.0, norm, axes, reduction)
        assert got.shape == wanted.shape
        # n is exact to a few float32 ulp; (n - 1)^2 loses the relative accuracy near 1, hence the absolute bound
        torch.testing.assert_close(got.double(), wanted, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize(NAMES, OPTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_derivatives_equal_plain_autograd(backend, device, form, norm, axes, reduction, layout):
    """First and second derivative in float64 against autograd through the plain formula."""
    for target in (1.0, 0.3):
        grad = scaled((3, 4, 5, 3), axes, dtype=torch.float64, device=device).contiguous(memory_format=layout)
        grad.requires_grad_()
        tangent = torch.randn_like(grad)
        results = []
        for value in (
            gp.grad_norm_penalty(grad, form=form, target=target, norm=norm, axes=axes, reduction=reduction),
            oracles.penalty(grad, form, target, norm, axes, reduction),
        ):
            weights = torch.linspace(0.5, 2, value.numel(), dtype=torch.float64, device=device)
            upstream = weights.reshape(value.shape).requires_grad_()
            (first,) = torch.autograd.grad(value, grad, upstream, create_graph=True)
            second = torch.autograd.grad((first * tangent).sum(), (grad, upstream), allow_unused=True)
            results.append((first, *(torch.zeros(()) if s is None else s for s in second)))
        for got, wanted in zip(*results, strict=True):
            assert oracles.relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize(NAMES, OPTIONS)
def test_gradcheck_and_gradgradcheck(backend, device, form, norm, axes, reduction):
    grad = scaled((2, 3, 2, 1), axes, dtype=torch.float64, device=device).requires_grad_()

    def f(g):
        return gp.grad_norm_penalty(g, form=form, target=0.8, norm=norm, axes=axes, reduction=reduction)

    assert gradcheck(f, (grad,))
    assert gradgradcheck(f, (grad,))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
def test_third_derivative(backend, device, form, norm):
    grad = scaled((2, 3), "sample", dtype=torch.float64, device=device).requires_grad_()

    def first(g):
        value = gp.grad_norm_penalty(g, form=form, target=0.8, norm=norm)
        return torch.autograd.grad(value, g, create_graph=True)[0]

    assert gradgradcheck(first, (grad,))


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("norm", NORMS)
def test_grad_norm(backend, device, norm, axes):
    grad = torch.randn(3, 4, 5, 2, dtype=torch.float64, device=device, requires_grad=True)
    got = gp.grad_norm(grad, norm=norm, axes=axes)
    wanted = oracles.norms(grad, norm, axes)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted)
    assert gradcheck(lambda g: gp.grad_norm(g, norm=norm, axes=axes), (grad,))
    assert gradgradcheck(lambda g: gp.grad_norm(g, norm=norm, axes=axes), (grad,))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("axes", AXES)
def test_zero_gradient_gives_zero_never_nan(backend, device, form, norm, axes):
    grad = torch.zeros(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    value = gp.grad_norm_penalty(grad, form=form, norm=norm, axes=axes)
    assert value == oracles.penalty(grad, form, 1.0, norm, axes, "mean")
    (first,) = torch.autograd.grad(value, grad, create_graph=True)
    assert torch.equal(first, torch.zeros_like(grad))
    (second,) = torch.autograd.grad(first.sum(), grad)
    assert second.isfinite().all()


@pytest.mark.parametrize(("form", "target"), [("squared", 1.0), ("two_sided", 0.0), ("one_sided", 0.0)])
def test_squared_norm_is_curved_at_zero(backend, device, form, target):
    """n^2 is smooth at 0: its second derivative there is 2, not lost in the norm's kink."""
    grad = torch.zeros(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    value = gp.grad_norm_penalty(grad, form=form, target=target, reduction="sum")
    (first,) = torch.autograd.grad(value, grad, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    assert torch.equal(second, torch.full_like(grad, 2.0))


def test_linf_shares_the_gradient_among_ties(backend, device):
    grad = torch.tensor([[3.0, -3.0, 1.0]], dtype=torch.float64, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(gp.grad_norm(grad, norm="linf"), grad)
    assert first.tolist() == [[0.5, -0.5, 0.0]]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize("norm", NORMS)
def test_low_precision_accumulates_in_float32(backend, device, dtype, tolerance, norm):
    """65,536 elements: the value is as exact as float32 sums, the gradient is rounded to the dtype once."""
    grad = (torch.randn(2, 4, 128, 128, device=device) / 128).to(dtype).requires_grad_()
    value = gp.grad_norm_penalty(grad, norm=norm)
    assert value.dtype == torch.float32
    exact = grad.detach().double().requires_grad_()
    wanted = oracles.penalty(exact, "two_sided", 1.0, norm, "sample", "mean")
    assert oracles.relative_error(value, wanted) < 1e-5
    (first,) = torch.autograd.grad(value, grad)
    assert first.dtype == dtype
    assert oracles.relative_error(first, torch.autograd.grad(wanted, exact)[0]) < tolerance


def test_nan_and_inf_stay_visible(backend, device):
    for norm in NORMS:
        for bad in (float("nan"), float("inf")):
            grad = torch.ones(2, 40, device=device)
            grad[1, 33] = bad
            n = gp.grad_norm(grad, norm=norm)
            assert n[0].isfinite()
            assert not n[1].isfinite(), (norm, bad)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.transpose(0, 1), lambda x: x[:, :, ::2, 1:], lambda x: x[:, :1].expand(-1, 3, -1, -1)],
    ids=["transposed_batch", "sliced", "expanded"],
)
@pytest.mark.parametrize("axes", AXES)
def test_strided_inputs(backend, device, view, axes):
    grad = view(torch.randn(3, 3, 6, 5, dtype=torch.float64, device=device)).requires_grad_()
    value = gp.grad_norm_penalty(grad, axes=axes)
    wanted = oracles.penalty(grad, "two_sided", 1.0, "l2", axes, "mean")
    torch.testing.assert_close(value, wanted)
    results = (torch.autograd.grad(v, grad)[0] for v in (value, wanted))
    torch.testing.assert_close(*results)


def test_result_does_not_depend_on_the_number_of_threads():
    grad = torch.randn(3, 3, 200, 200)
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with gp.backend("cpu"):
                values.append(gp.grad_norm(grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@pytest.mark.parametrize("form", FORMS)
def test_table_derivatives_are_those_of_phi(form):
    row = penalties.PENALTIES[form]
    n = torch.tensor([0.1, 0.7, 1.3, 4.0], dtype=torch.float64, requires_grad=True)
    (d,) = torch.autograd.grad(row.phi(n, 0.9).sum(), n, create_graph=True)
    torch.testing.assert_close(row.d(n, 0.9), d)
    if d.requires_grad:
        (d2,) = torch.autograd.grad(d.sum(), n, allow_unused=True)
        torch.testing.assert_close(row.d2(n, 0.9), torch.zeros_like(n) if d2 is None else d2)


X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gp.grad_norm_penalty(X, form="cubic"), ValueError, "form: wanted one of 'two_sided', .*, got 'cubic'"),
        (lambda: gp.grad_norm_penalty(X, norm="l3"), ValueError, "norm: wanted one of 'l2', 'l1', 'linf', got 'l3'"),
        (lambda: gp.grad_norm_penalty(X, axes="row"), ValueError, "axes: wanted one of 'sample', 'pixel', 'batch'"),
        (lambda: gp.grad_norm_penalty(X, reduction="max"), ValueError, "reduction: wanted one of"),
        (lambda: gp.grad_norm_penalty(X, target=-1.0), ValueError, "target: wanted a finite number >= 0, got -1.0"),
        (lambda: gp.grad_norm_penalty(X, target=X), TypeError, "target: wanted a number, got Tensor"),
        (lambda: gp.grad_norm_penalty(X[:, 0], axes="pixel"), ValueError, "grad: wanted at least 2 dimensions"),
        (lambda: gp.grad_norm(X[:0]), ValueError, r"grad: wanted a non-empty batch, got shape \(0, 3\)"),
        (lambda: gp.grad_norm(X.bool()), TypeError, "grad: wanted a floating-point tensor, got torch.bool"),
        (lambda: gp.grad_norm(X.to(torch.complex64)), TypeError, "grad: wanted a floating-point tensor"),
        (lambda: gp.grad_norm(None), TypeError, "grad: wanted a torch.Tensor, got NoneType"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
