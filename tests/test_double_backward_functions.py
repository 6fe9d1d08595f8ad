"""The Functions of the second-order engine by finite differences, convolutions of any options, and the fusion of a norm
with its activation."""

import plain
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plain import float64_on_one_thread  # noqa: F401
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian

import gpkernels as gp
from gpkernels.double_backward import bilinear, norms, pointwise, pooling
from gpkernels.ops.norm_act import reference

aten = torch.ops.aten


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def check(function, *inputs):
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


MAPS = {
    "linear": (bilinear.Linear(), (2, 3), (2, 3), (2,)),
    "convolution": (
        bilinear.Convolution((2, 1), (1, 0), (1, 2), False, (0, 0), 2), (1, 2, 3, 3), (2, 1, 2, 2), (2,)
    ),
    "transposed": (
        bilinear.Convolution((2, 1), (1, 0), (1, 2), True, (1, 0), 2), (1, 2, 2, 2), (2, 1, 2, 2), (2,)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPS)
def test_bilinear_functions(name):
    map, *shapes = MAPS[name]
    x, w, b = (leaf(*shape) for shape in shapes)
    check(lambda *t: bilinear.Apply.apply(*t, map, None), x, w, b)
    check(lambda x, w: bilinear.Apply.apply(x, w, None, map, None), x, w)
    g = leaf(*map.apply(x, w, b).shape)
    check(lambda g, w, b: bilinear.ToInput.apply(g, w, b, x.detach(), map, None), g, w, b)
    check(lambda g, x: bilinear.ToWeight.apply(g, x, w.detach(), map), g, x)


@pytest.mark.parametrize("act", [pointwise.Leaky(0.0), pointwise.Leaky(0.3), pointwise.Clip(-0.5, 0.7)], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_activations(act, in_place):
    x, g = leaf(3, 4), leaf(3, 4)
    check(lambda x: pointwise.Activate.apply(x * 1, act, in_place), x)
    check(lambda g: pointwise.Slope.apply(g, act.apply(x.detach(), in_place=False), act), g)


def test_pools():
    x = leaf(1, 2, 4, 5)
    options = ([2, 3], [1, 2], [1, 1], True, False, None)
    average = pooling.Average(aten.avg_pool2d.default, aten.avg_pool2d_backward.default, options)
    options = ([2, 2], [2, 1], [0, 1], [1, 2], True)
    y, indices = aten.max_pool2d_with_indices(x.detach(), *options)
    maximum = pooling.Maximum(aten.max_pool2d_with_indices_backward.default, options, 2)
    for pool, picked in ((average, None), (maximum, indices)):
        check(lambda x, pool=pool, picked=picked: pooling.Pool.apply(x, pool, picked, None), x)
        g = leaf(*pool.apply(x.detach(), picked).shape)
        arguments = pool, picked, x.shape, torch.contiguous_format
        check(lambda g, arguments=arguments: pooling.Unpool.apply(g, *arguments), g)
    torch.testing.assert_close(maximum.apply(x, indices), y)


NORMS = {
    "batch": (norms.Statistics(0, 0.1), (3, 2, 2)),
    "group": (norms.Statistics(2, 0.1), (2, 4, 2)),
    "instance": (norms.Statistics(2, 0.1), (2, 2, 3)),
    "layer": (norms.Statistics(1, 0.1, 3), (2, 2, 3)),
}


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norm_backward_along_tangents_of_all_three(name, activated):
    """The gradients of weight and bias are results too, whose tangents take the general path."""
    statistics, shape = NORMS[name]
    x, g = leaf(*shape), leaf(*shape)
    channels = statistics.channels or shape[1]
    w, b = leaf(channels), leaf(channels)
    z = torch.randn(shape) if activated else None

    def run(g, x, w, b, needs=(True, True, True)):
        mean, rstd = reference.statistics(statistics.view(x.detach()), statistics.groups, statistics.eps)
        return norms.NormBackward.apply(g, x, w, b, z, mean, rstd, statistics, 0.3, needs)

    check(run, g, x, w, b)
    check(lambda g, x: run(g, x, None, None, (True, False, False))[0], g, x)
    check(lambda g, w: run(g, x.detach(), w, None)[1], g, w)


def every_norm(x, w, b):
    running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    return {
        "batch": lambda: F.batch_norm(x, *running, w, b, True),
        "instance": lambda: F.instance_norm(x, weight=w, bias=b),
        "layer": lambda: F.layer_norm(x, x.shape[1:2], w, b),
        "group": lambda: F.group_norm(x, 2, w, b),
        "evaluated batch": lambda: F.batch_norm(x, *running, w, b),
    }


@pytest.mark.parametrize("name", ["batch", "instance", "layer", "group", "evaluated batch"])
def test_norm_and_activation_by_finite_differences(name):
    def run(*inputs):
        with gp.fast_double_backward():
            return F.leaky_relu(every_norm(*inputs)[name](), 0.3)

    check(run, leaf(2, 4, 4), leaf(4), leaf(4))


sizes = st.integers(1, 3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), dims=sizes, groups=sizes, transposed=st.booleans(), bias=st.booleans())
def test_convolutions_of_any_options(data, dims, groups, transposed, bias):
    def each(strategy):
        return tuple(data.draw(strategy) for _ in range(dims))

    batch, inputs, outputs = (data.draw(sizes) for _ in range(3))
    kernel, stride, dilation = each(sizes), each(sizes), each(st.integers(1, 2))
    padding = each(st.integers(0, 2))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    size = each(st.integers(1, 5))
    if transposed:
        extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        options["output_padding"] = extra
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        weight = (groups * inputs, outputs, *kernel)
    else:
        function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        weight = (groups * outputs, inputs, *kernel)
        if data.draw(st.booleans()):
            options["padding"] = data.draw(st.sampled_from(["same", "valid"]))
    shapes = [(batch, groups * inputs, *size), weight, (groups * outputs,)][: 3 if bias else 2]
    leaves = [leaf(*shape) for shape in shapes]
    results = []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        with block:
            y = plain.outcome(lambda: function(*leaves, **options))
        if isinstance(y, Exception):
            results.append(y)
            continue
        assume(y.numel() > 0)
        first = plain.gradients(y.sin().sum(), leaves, create_graph=True)
        second = plain.gradients(sum(g.sin().sum() for g in first), leaves)
        results.append([y, *first, *second])
    plain.assert_same_outcome(results[1], results[0], 1e-11)


FUSIONS = {
    "F.relu": (F.relu, True),
    "F.relu in place": (lambda h: F.relu(h, inplace=True), True),
    "torch.relu": (torch.relu, True),
    "torch.relu_": (torch.relu_, True),
    "x.relu": (lambda h: h.relu(), True),
    "F.leaky_relu": (lambda h: F.leaky_relu(h, 0.2), True),
    "F.leaky_relu in place": (lambda h: F.leaky_relu(h, 0.2, True), True),
    "nn.ReLU": (torch.nn.ReLU(True), True),
    "F.silu": (F.silu, False),
    "F.relu6": (F.relu6, False),
    "F.leaky_relu of a negative slope": (lambda h: F.leaky_relu(h, -0.2), False),
    "of a sum": (lambda h: F.relu(h + 1), False),
    "of a view": (lambda h: F.relu(h.flatten(1)), False),
    "modified in between": (lambda h: F.relu(h.mul_(2)), False),
    "modified by a view": (lambda h: (h[:, 0].add_(1), F.relu(h))[1], False),
    "twice": (lambda h: F.relu(F.relu(h)), False),
    "used twice": (lambda h: F.relu(h) + 2 * h, None),
    "used twice, other activation": (lambda h: F.relu(h) + F.leaky_relu(h, 0.2) + F.silu(h), None),
    "used before": (lambda h: (h * 2).exp() + F.relu(h), None),
    "argument used afterwards": (lambda h: (F.relu_(h), h)[1], True),
    "argument and result": (lambda h: F.relu_(h) + h, None),
    "a view made before": (lambda h: (h.flatten(1), F.relu_(h))[0], None),
    "argument used afterwards, leaky": (lambda h: (F.leaky_relu(h, 0.2, True), h * 3)[1], None),
    "detached": (lambda h: F.relu(h.detach()) * h, None),
    "under no_grad": (lambda h: relu_without_gradient(h) * h, None),
    "result modified": (lambda h: F.leaky_relu(h, 0.2).mul_(2), None),
    "result of in place modified": (lambda h: F.leaky_relu(h, 0.2, True).mul_(2), None),
    "relu's result modified": (lambda h: F.relu(h).mul_(2), None),
}


def relu_without_gradient(h):
    with torch.no_grad():
        return F.relu(h)


@pytest.mark.parametrize("name", ["batch", "instance", "layer", "group"])
@pytest.mark.parametrize("way", FUSIONS)
def test_fusion_of_a_norm_with_its_activation(name, way):
    act, fused = FUSIONS[way]
    x, w, b = leaf(3, 4, 4), leaf(4), leaf(4)
    results, names = [], []
    for block in (torch.enable_grad(), gp.fast_double_backward()):

        def run(block=block):
            with block:
                y = act(every_norm(x * 1, w, b)[name]())
            names.append(y.grad_fn.name())
            first = plain.gradients(y.sin().sum(), [x, w, b], create_graph=True)
            return [y.detach(), *first, *plain.gradients(sum(g.sin().sum() for g in first), [x, w, b])]

        results.append(plain.outcome(run))
    plain.assert_same_outcome(results[1], results[0], 1e-10)
    assert fused is None or (names[1] == "NormActivationBackward") == fused


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_result_that_changes_before_what_it_was_made_from(changed):
    """A changed result of LeakyReLU is nothing to plain autograd, a changed input or weight of the norm is an error."""
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        x, w, b = leaf(3, 4, 4), leaf(4), leaf(4)
        with block:
            h = x * 1
            z = F.leaky_relu(F.group_norm(h, 2, w, b), 0.2).mul_(2)
        change({"input": h, "weight": w}[changed])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            plain.gradients(z.cos().sum(), [x, w, b])


@pytest.mark.parametrize("name", ["batch", "group"])
@pytest.mark.parametrize("changed", ["nothing", "input", "weight", "bias", "output"])
@pytest.mark.parametrize("when", ["between norm and activation", "before the backward"])
def test_tensors_that_change(name, changed, when):
    """No error where plain autograd has none; where it has one, that, or what came before the change."""
    results = []
    for block, what in ((torch.enable_grad(), "nothing"), (torch.enable_grad(), changed), (None, changed)):
        torch.manual_seed(1)
        x, w, b = leaf(3, 4, 4), leaf(4), leaf(4)

        def run(block=block, what=what, inputs=(x, w, b)):
            with block or gp.fast_double_backward():
                h = inputs[0] * 1
                y = every_norm(h, *inputs[1:])[name]()
                tensor = {"input": h, "weight": inputs[1], "bias": inputs[2], "output": y}.get(what, torch.zeros(1))
                if when.startswith("between"):
                    change(tensor)
                z = F.leaky_relu(y, 0.2)
            if when.startswith("before"):
                change(tensor)
            return plain.gradients(z.cos().sum(), list(inputs))

        results.append(plain.outcome(run))
    unchanged, wanted, got = results
    if isinstance(wanted, Exception) and isinstance(got, list):
        wanted = unchanged
    plain.assert_same_outcome(got, wanted, 1e-11)


def change(tensor):
    with torch.no_grad():
        tensor.add_(1)


def test_hessian_of_a_function_with_the_block_inside():
    def penalty(x):
        with gp.fast_double_backward():
            y = F.softplus(F.leaky_relu(F.conv1d(x, W), 0.2)).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return g.square().sum(0).flatten()

    x = leaf(2, 4, 4)
    torch.testing.assert_close(jacobian(penalty, x, vectorize=True), jacobian(penalty, x))


CALLS = {
    "conv": (lambda x, w: F.conv1d(x, w), (2, 4, 3)),
    "conv2d of few channels": (lambda x, w: F.leaky_relu(F.conv2d(x[:, :3, None], w, padding=1), 0.2), (2, 3, 3, 3)),
    "transposed conv": (lambda x, w: F.conv_transpose1d(x, w), (4, 2, 2)),
    "relu": (lambda x, w: F.relu(x) * x * w, (4,)),
    "pools": (lambda x, w: F.max_pool1d(x * w, 2) * F.avg_pool1d(x, 2), (4,)),
    "norm": (lambda x, w: F.leaky_relu(F.group_norm(x, 2, w), 0.2), (4,)),
    "batch norm": (lambda x, w: F.relu(F.batch_norm(x, None, None, w, training=True)), (4,)),
    "linear": (lambda x, w: F.linear(x, w).square(), (2, 4)),
}
W = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 4, 3)


@pytest.mark.parametrize("name", CALLS)
def test_batched_gradients_of_a_graph_made_inside(name):
    """As torch.autograd.functional's vectorize=True does: a backward, and a double one, under vmap."""
    call, shape = CALLS[name]
    leaves = [leaf(2, 4, 4), leaf(*shape)]
    for create_graph in (False, True):
        y = call(*leaves).flatten()
        rows = zip(*(torch.autograd.grad(y, leaves, e, create_graph=True) for e in torch.eye(len(y))), strict=True)
        with gp.fast_double_backward():
            y = call(*leaves).flatten()
        batched = torch.autograd.grad(y, leaves, torch.eye(len(y)), is_grads_batched=True, create_graph=create_graph)
        results = [list(batched), [torch.stack(r) for r in rows]]
        if create_graph:
            for found in results:
                found += plain.gradients(sum(g.sin().sum() for g in found), leaves)
        plain.assert_close(*results, 1e-11)


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 4)])
def test_linear_layers_of_no_features(shape):
    results = []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        torch.manual_seed(1)
        leaves = [leaf(*shape), leaf(3, 0), leaf(3)]
        with block:
            y = F.linear(leaves[0][..., :0], *leaves[1:])
        first = plain.gradients(y.sin().sum(), leaves, create_graph=True)
        results.append([y, *first, *plain.gradients(sum(g.sin().sum() for g in first), leaves)])
    plain.assert_close(*results)


def test_changes_of_what_a_frozen_linear_layer_was_applied_to():
    """It keeps its input for the weight's gradient alone; a bias that learns needs none."""
    results = []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        torch.manual_seed(1)
        x, w, b = leaf(2, 4), torch.randn(4, 4), leaf(4)
        with block:
            h = x * 1
            h += F.linear(h, w, b)
        first = plain.gradients(h.sin().sum(), [x, b], create_graph=True)
        results.append([*first, *plain.gradients(sum(g.sin().sum() for g in first), [x, b])])
    plain.assert_close(*results)


@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (2, 3), (2, 1), (5, 2, 3), (4,)])
@pytest.mark.parametrize("of_bias", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_bias_of_another_shape(shape, of_bias, autocast):
    """The dtype, the values and the errors of plain torch."""
    results = []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        torch.manual_seed(1)
        x, w = (torch.randn(size, dtype=torch.float32).requires_grad_() for size in ((2, 4), (3, 4)))
        b = torch.randn(shape, dtype=of_bias).requires_grad_()

        def run(block=block, leaves=(x, w, b)):
            with block, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = F.linear(*leaves)
            return [y, *plain.gradients(y.sin().sum(), leaves)]

        results.append(plain.outcome(run))
    plain.assert_same_outcome(results[1], results[0], 2e-2 if autocast else None)
    assert isinstance(results[1], list) == (len(shape) < 3 and shape != (4,) and of_bias == torch.float32)


def test_nested_tensors_are_left_to_torch():
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], requires_grad=True)
    weight, results = leaf(5, 3), []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        with block:
            y = F.linear(nested, weight)
        results.append(plain.gradients(sum(t.square().sum() for t in y.unbind()), [weight]))
    plain.assert_close(*results)


def test_results_can_be_saved_to_files(tmp_path):
    with gp.fast_double_backward():
        y = F.batch_norm(leaf(3, 4), None, None, training=True)
    torch.save(y, tmp_path / "y.pt")
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), y)
