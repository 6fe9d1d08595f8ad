"""Every row of the second-order engine's table against plain torch: values and three derivatives, in every layout."""

import inspect
import itertools
import math

import plain
import pytest
import rows
import torch
import torch.nn.functional as F
from plain import float64_on_one_thread  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkernels as gp
from gpkernels.double_backward.table import BY_FUNCTION, ROWS

LAYOUTS = {
    "contiguous": lambda h: h,
    "channels last": lambda h: h.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[h.dim()]),
    "strided": lambda h: torch.stack([h, -h], -1)[..., 0],
    "transposed": lambda h: h.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda h: h[:1].expand_as(h),
}
ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward")


def cases(table):
    for row in ROWS:
        for i, (shapes, options) in enumerate(table.get(row.name, ())):
            yield pytest.param(row, row.functions[0], shapes, options, id=f"{row.name}-{i}")
            for function in row.functions[1:]:
                if not options:
                    owner = "Tensor" if inspect.ismethoddescriptor(function) else function.__module__
                    yield pytest.param(row, function, shapes, options, id=f"{row.name}-{i}-{owner}")


EVERY_CASE = pytest.mark.parametrize(("row", "function", "shapes", "options"), list(cases(rows.CASES)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_has_cases(row):
    """And the mode knows each of its functions."""
    assert row.name in rows.CASES or row.name == "multi_head_attention_forward"  # the transformer of the zoo
    assert all(BY_FUNCTION[function] is row for function in row.functions)


def leaves_and_options(shapes, options):
    generator = torch.Generator().manual_seed(7)
    leaves = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }
    channels = next(iter(shapes.values()))[1:2]
    return leaves, {
        name: torch.full(channels, value, dtype=torch.float64) if name.startswith("running") else value
        for name, value in options.items()
    }


def call(row, function, leaves, options, layout, by_keyword):
    """The function on tensors of which the first, in that layout, is no leaf, so that it may change in place."""
    first, *_ = leaves
    arguments = {**leaves, first: layout(leaves[first] * 1), **options}
    signature = inspect.signature(row.call).parameters
    if inspect.ismethoddescriptor(function):
        result = function(*arguments.values())
    elif by_keyword:
        if row.name == "batch_norm":
            arguments = {"running_mean": None, "running_var": None, **arguments}
        result = function(**arguments)
    elif row.name in ATTENTION:
        result = function(*(arguments[name] for name in leaves), **options)
    else:
        named = {name: v for name, v in arguments.items() if signature[name].kind is inspect.Parameter.KEYWORD_ONLY}
        order = [name for name in signature if name != "recording"]
        last = max(order.index(name) for name in arguments.keys() - named)
        default = {name: p.default for name, p in signature.items()} | {"running_mean": None, "running_var": None}
        result = function(*(arguments.get(name, default[name]) for name in order[: last + 1]), **named)
    return result[0] if isinstance(result, tuple) else result


def derivatives(y, leaves, orders=3):
    """y and its derivatives in every leaf, each order's taken of a function in which all of the last one matters."""
    leaves, found, last = list(leaves.values()), [y], [y]
    for order in range(orders):
        generator = torch.Generator().manual_seed(order)
        value = sum((t.sin() * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in last)
        last = plain.gradients(value, leaves, create_graph=True)
        found += last
    return [t.detach() for t in found]


def nodes(y):
    seen, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
    return seen


def is_ours(y):
    return any(
        getattr(type(n), "_forward_cls", int).__module__.startswith("gpkernels.double_backward") for n in nodes(y)
    )


def norm_by_hand(name, input, weight=None, bias=None, eps=1e-5, normalized_shape=(), num_groups=1, **options):
    """A norm of differentiable operations. Torch's own has wrong third derivatives (pytorch issues 175754, 186256), and
    none of the second order, for GroupNorm of the first, with a bias and no weight."""
    spatial = tuple(range(2, input.dim()))
    dims = {"batch_norm": (0, *spatial), "instance_norm": spatial, "group_norm": -1}
    x = input.reshape(len(input), num_groups, -1) if name == "group_norm" else input
    dim = tuple(range(-len(normalized_shape), 0)) if name == "layer_norm" else dims[name]
    centred = x - x.mean(dim, keepdim=True)
    y = (centred * (centred.square().mean(dim, keepdim=True) + eps).rsqrt()).reshape(input.shape)
    shape = normalized_shape if name == "layer_norm" else (-1, *[1] * len(spatial))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def both(row, function, shapes, options, layout=LAYOUTS["contiguous"], by_keyword=True):
    """The results outside and inside of the block, after they and their derivatives were found equal."""
    norm = row.name in ("instance_norm", "layer_norm", "group_norm") or options.get("training", False)
    third = not norm and "output_padding" not in options  # of which torch has no third derivative
    first, *rest = shapes
    known = not norm or rest != ["bias"]
    results, found = [], []
    for block in (sdpa_kernel(SDPBackend.MATH), gp.fast_double_backward()):
        leaves, others = leaves_and_options(shapes, options)
        with block:
            results.append(call(row, function, leaves, others, layout, by_keyword))
        running = [others[name] for name in others if name.startswith("running")]
        if known:
            found.append([*running, *derivatives(results[-1], leaves, 3 if third else 2)])
    if known:
        plain.assert_close(found[1], found[0], 1e-11)
    if norm and not running:
        y = norm_by_hand(row.name, **{**leaves, first: layout(leaves[first] * 1), **others})
        plain.assert_close(derivatives(results[1], leaves), derivatives(y, leaves), 1e-10)
    return results


def assert_rerouted(row, options, plainly, ours):
    if row.name in ATTENTION:
        return  # the very derivatives show it
    if row.name == "prelu" or (row.name == "batch_norm" and not options.get("training")):
        assert {n.name() for n in nodes(ours)} != {n.name() for n in nodes(plainly)}
    else:
        assert is_ours(ours)


@EVERY_CASE
@pytest.mark.parametrize("by_keyword", [True, False], ids=["keywords", "positions"])
def test_values_and_three_derivatives(row, function, shapes, options, by_keyword):
    assert_rerouted(row, options, *both(row, function, shapes, options, by_keyword=by_keyword))


def layouts():
    for case, layout in itertools.product(cases(rows.CASES), list(LAYOUTS)[1:]):
        row, _, shapes, options = case.values
        dims = len(next(iter(shapes.values())))
        changes = row.name == "relu_" or options.get("inplace", False)
        if dims >= (4 if layout == "channels last" else 2) and not (changes and layout == "expanded"):
            yield pytest.param(*case.values, layout, changes, id=f"{case.id}-{layout}")


@pytest.mark.parametrize(("row", "function", "shapes", "options", "layout", "changes"), list(layouts()))
def test_layouts(row, function, shapes, options, layout, changes):
    plainly, ours = both(row, function, shapes, options, LAYOUTS[layout])
    if changes and ours._is_view():
        assert not is_ours(ours)
    else:
        assert_rerouted(row, options, plainly, ours)
        assert ours.stride() == plainly.stride() or not plainly.is_contiguous()


@pytest.mark.parametrize(("row", "function", "shapes", "options"), list(cases(rows.ALONE)))
def test_calls_left_to_torch(row, function, shapes, options):
    plainly, ours = both(row, function, shapes, options)
    assert not is_ours(ours)
    assert {n.name() for n in nodes(ours)} == {n.name() for n in nodes(plainly)}


REASONS = ("no_grad", "no gradient", "subclass", "transform", "forward_ad", "complex")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        pytest.param(row, why, id=f"{row.name}-{why}")
        for row, why in itertools.product(ROWS[:-2], REASONS)
        if why != "complex" or row.name.startswith(("conv", "linear"))
    ],
)
def test_arguments_left_to_torch(row, why):
    shapes, options = rows.CASES[row.name][0]
    leaves, options = leaves_and_options(shapes, options)
    first, *rest = leaves
    if why in ("no gradient", "complex"):
        to = torch.complex128 if why == "complex" else torch.float64
        leaves = {name: t.detach().to(to).requires_grad_(why == "complex") for name, t in leaves.items()}
    if why == "subclass":

        class Subclass(torch.Tensor):
            pass

        leaves[first] = leaves[first].detach().as_subclass(Subclass).requires_grad_()

    def run(x):
        running = {"running_mean": None, "running_var": None} if row.name == "batch_norm" else {}
        return row.functions[0](x * 1, **{n: leaves[n] for n in rest}, **running, **options)

    def result():
        if why == "transform":
            return torch.func.vmap(run)(torch.stack([leaves[first]] * 2))
        if why == "forward_ad":
            with torch.autograd.forward_ad.dual_level():
                y = run(torch.autograd.forward_ad.make_dual(leaves[first], torch.ones_like(leaves[first])))
                return torch.autograd.forward_ad.unpack_dual(y).tangent
        with torch.no_grad() if why == "no_grad" else torch.enable_grad():
            return run(leaves[first])

    wanted = plain.outcome(result)
    with gp.fast_double_backward():
        got = plain.outcome(result)
    plain.assert_same_outcome(
        got if isinstance(got, Exception) else [got], wanted if isinstance(wanted, Exception) else [wanted]
    )


SLOPE, ZERO, ONE = (torch.full((1,), value, dtype=torch.float64) for value in (0.3, 0.0, 1.0))
KINKS = {
    "relu": F.relu, "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "relu6": F.relu6, "hardtanh": F.hardtanh,
    "leaky_relu of slope 0": lambda x: F.leaky_relu(x, 0.0),
    "in place relu": lambda x: F.relu_(x * 1), "in place leaky_relu": lambda x: F.leaky_relu(x * 1, 0.2, True),
    "in place hardtanh": lambda x: F.hardtanh(x * 1, inplace=True),
    "hardtanh of no width": lambda x: F.hardtanh(x, 1, 1),
    "max_pool2d": lambda x: F.max_pool2d(x.view(1, 1, 2, -1), (2, 3)),
    "max_pool1d": lambda x: F.max_pool1d(x.view(1, 1, -1), 4),
    "batch_norm and relu": lambda x: F.relu(F.batch_norm(x.view(-1, 1), ZERO, ONE)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINKS)
def test_at_kinks_and_ties(name):
    x = torch.tensor([0.0, -0.0, -1.0, 1.0, 6.0, 6.0, 1.0, 1.0, 0.0, -2.0, math.inf, -math.inf], dtype=torch.float64)
    results = []
    for block in (torch.enable_grad(), gp.fast_double_backward()):
        x = x.detach().requires_grad_()
        with block:
            y = KINKS[name](x).flatten()
        tangent = torch.linspace(1, 2, len(y), dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(y, x, tangent, create_graph=True)
        (gg,) = torch.autograd.grad(g, tangent, torch.linspace(3, 4, 12, dtype=torch.float64))
        results.append((y, g, gg))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_prelu_at_zero():
    """Torch's second derivative, 1, is not that of its first, the slope."""
    x, tangent = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    with gp.fast_double_backward():
        y = F.prelu(x, SLOPE)
    (g,) = torch.autograd.grad(y, x, tangent, create_graph=True)
    (gg,) = torch.autograd.grad(g, tangent, torch.ones_like(g))
    (wanted,) = torch.autograd.grad(F.prelu(x, SLOPE), x, torch.ones_like(x))
    torch.testing.assert_close(gg, wanted)


MISUSES = {
    "same with a stride": lambda x: F.conv2d(x, W, padding="same", stride=2),
    "unknown padding": lambda x: F.conv2d(x, W, padding="foo"),
    "negative padding": lambda x: F.conv2d(x, W, padding=-1),
    "three strides": lambda x: F.conv2d(x, W, stride=(1, 1, 1)),
    "other channels": lambda x: F.conv2d(x, W[:, :2]),
    "another dtype": lambda x: F.linear(x, torch.ones(3, 8)),
    "unknown keyword": lambda x: F.conv2d(x, W, strides=2),
    "too few slopes": lambda x: F.prelu(x, torch.ones(2, dtype=x.dtype)),
    "too many slopes": lambda x: F.prelu(x[:, :1], torch.ones(4, dtype=x.dtype)),
    "slopes of a vector": lambda x: F.prelu(x[0, 0, 0], torch.ones(8, dtype=x.dtype)),
    "bounds that cross": lambda x: F.hardtanh(x, 1.0, -1.0),
    "integer kernel of numpy": lambda x: F.avg_pool2d(x, rows.np.int64(2)),
    "too much pool padding": lambda x: F.max_pool2d(x, 2, padding=2),
    "one running mean": lambda x: F.batch_norm(x, x.new_zeros(1), x.new_ones(1)),
    "one running mean, training": lambda x: F.batch_norm(x, x.new_zeros(1), x.new_ones(1), training=True),
    "five running means": lambda x: F.batch_norm(x, x.new_zeros(5), x.new_ones(5), training=True),
    "one weight of batch_norm": lambda x: F.batch_norm(x, None, None, x.new_ones(1), training=True),
    "no statistics": lambda x: F.batch_norm(x, None, None),
    "one value a channel": lambda x: F.batch_norm(x[:1, :, :1, :1], None, None, training=True),
    "one pixel": lambda x: F.instance_norm(x[..., :1, :1]),
    "one value a group": lambda x: F.group_norm(x[:1, :, 0, 0], 3),
    "groups that do not divide": lambda x: F.group_norm(x, 2),
    "another normalized_shape": lambda x: F.layer_norm(x, (7,)),
    "a leaf in place": lambda x: F.relu_(x),
    "empty": lambda x: F.conv2d(x[:0], W),
    "empty norm": lambda x: F.batch_norm(x[:0], None, None, training=True),
    "empty pool": lambda x: F.max_pool2d(x[:0], 2),
}
W = torch.ones(4, 3, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_raises_what_it_raised(name):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    wanted = plain.outcome(lambda: MISUSES[name](x))
    with gp.fast_double_backward():
        got = plain.outcome(lambda: MISUSES[name](x))
    assert type(got) is type(wanted), got
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", ROWS[:-1], ids=lambda row: row.name)
def test_dtypes_under_autocast(row, low):
    """torch's, of the result and of the first derivative: for an input of float32, and for one that autocast made."""
    for dtype, (shapes, options) in itertools.product((torch.float32, low), rows.CASES[row.name]):
        found = []
        for block in (torch.enable_grad(), gp.fast_double_backward()):
            leaves, others = leaves_and_options(shapes, options)
            first = next(iter(leaves))
            leaves = {n: t.detach().to(dtype if n == first else torch.float32) for n, t in leaves.items()}
            leaves = {n: t.requires_grad_() for n, t in leaves.items()}
            others = {n: v.float() if isinstance(v, torch.Tensor) else v for n, v in others.items()}

            def run(leaves=leaves, others=others, block=block):
                with torch.autocast("cpu", low), block:
                    y = call(row, row.functions[0], leaves, others, lambda h: h, True)
                gradients = plain.gradients(y.float().sin().sum(), list(leaves.values()), create_graph=True)
                return [t.dtype for t in (y, *gradients)]

            found.append(plain.outcome(run))
        if not isinstance(found[0], Exception):  # as torch's first derivatives of some norms do
            assert found[1] == found[0]
