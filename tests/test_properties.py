"""Shapes and options that nobody thought of: the C++ kernels against the reference, drawn by hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpkernels as gp
from gpkernels.ops.grad_penalty import penalties


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 2**31), per_element=st.booleans())
def test_interpolate_equals_the_reference_for_any_shape(shape, seed, per_element):
    real, fake = (torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(2))
    results = []
    for name in ("reference", "cpu"):
        with gp.backend(name):
            a, b = real.clone().requires_grad_(), fake.clone().requires_grad_()
            out = gp.interpolate(a, b, per_element=per_element, generator=torch.Generator().manual_seed(seed))
            results.append((out, *torch.autograd.grad(out.square().sum(), (a, b))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    form=st.sampled_from(tuple(penalties.PENALTIES)),
    norm=st.sampled_from(("l2", "l1", "linf")),
    axes=st.sampled_from(("sample", "pixel", "batch")),
    reduction=st.sampled_from(("mean", "sum", "none")),
    target=st.floats(0, 3),
    seed=st.integers(0, 2**31),
)
def test_penalty_equals_the_reference_for_any_shape_and_options(shape, form, norm, axes, reduction, target, seed):
    draws = torch.Generator().manual_seed(seed)
    grad, tangent = (torch.randn(shape, dtype=torch.float64, generator=draws) for _ in range(2))
    results = []
    for name in ("reference", "cpu"):
        with gp.backend(name):
            g = grad.clone().requires_grad_()
            value = gp.grad_norm_penalty(g, form=form, target=target, norm=norm, axes=axes, reduction=reduction)
            (first,) = torch.autograd.grad(value.sum(), g, create_graph=True)
            (second,) = torch.autograd.grad((first * tangent).sum(), g)
            results.append((value, first, second))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    margin=st.floats(0, 3),
    slope=st.floats(-3, 1),
    seed=st.integers(0, 2**31),
)
def test_pairwise_cost_equals_the_reference_for_any_shape_and_options(shape, margin, slope, seed):
    draws = torch.Generator().manual_seed(seed)
    real, fake = (torch.randn(shape, dtype=torch.float64, generator=draws) for _ in range(2))
    losses = [torch.randn(shape[0], dtype=torch.float64, generator=draws).requires_grad_() for _ in range(2)]
    results = []
    for name in ("reference", "cpu"):
        with gp.backend(name):
            cost, delta = gp.pairwise_cost(real, fake, *losses, margin=margin, slope=slope)
            results.append((cost, delta, *torch.autograd.grad(cost.square().sum(), losses)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
