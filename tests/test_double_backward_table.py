"""What the second-order engine's table says of each row that it leaves to torch, phrase by phrase."""

import itertools

import pytest
import rows
import torch

from gpkernels.double_backward import Recording, _nodes
from gpkernels.double_backward.table import ROWS

BATCHED, IN_PLACE = "input without a batch dimension", "in place on a view"
MIXED, AUTOCAST = "parameters of another dtype on CUDA", "autocast on another device than CPU and CUDA"


def x(*shape, dtype=torch.float64):
    return torch.randn(shape or (2, 3, 4), dtype=dtype, requires_grad=True) * 1


def call(*args, **options):
    return args, options


W, HALF = torch.ones(3, dtype=torch.float64), torch.float16
CASES = {
    ("linear", "a vector as input"): lambda: call(x(4), x(2, 4)),
    ("linear", "a vector as weight"): lambda: call(x(2, 4), x(4)),
    ("relu_", IN_PLACE): lambda: call(x()[0]),
    ("leaky_relu", "a negative slope"): lambda: call(x(), -0.1),
    ("hardtanh", "a bound that the dtype cannot hold"): lambda: call(x(dtype=HALF), -1.0, 0.1),
    ("prelu", "neither one slope nor one a channel"): lambda: call(x(), x(2)),
    ("prelu", "slopes of two dimensions"): lambda: call(x(), x(1, 1)),
    ("silu", "in place"): lambda: call(x(), inplace=True),
    ("batch_norm", "a vector as input"): lambda: call(x(3), None, None, training=True),
    ("batch_norm", "parameters or statistics of another shape than (C,)"): lambda: call(x(), W[:1], W[:1]),
    ("batch_norm", "training on one value a channel"): lambda: call(x(1, 3), None, None, training=True),
    ("batch_norm", "evaluation without statistics"): lambda: call(x(), None, None),
    ("batch_norm", "evaluation with statistics that require grad"): lambda: call(x(), x(3), x(3)),
    ("instance_norm", "running statistics"): lambda: call(x(), W, W),
    ("instance_norm", "one value a channel"): lambda: call(x(2, 3, 1)),
    ("instance_norm", "input without a spatial dimension"): lambda: call(x(2, 3)),
    ("group_norm", "one value a group"): lambda: call(x(2, 3), 3),
}
for dims, kind in itertools.product((1, 2, 3), ("conv", "conv_transpose")):
    CASES[f"{kind}{dims}d", BATCHED] = lambda d=dims: call(x(4, *[6] * d), x(4, 4, *[2] * d))
for dims in (1, 2, 3):
    CASES[f"conv{dims}d", "padding='same' of even size"] = lambda d=dims: call(
        x(1, 4, *[6] * d), x(4, 4, *[2] * d), padding="same"
    )
    for kind in ("avg", "adaptive_avg", "max"):
        CASES[f"{kind}_pool{dims}d", BATCHED] = lambda d=dims: call(x(4, *[6] * d), 2)
    CASES[f"adaptive_avg_pool{dims}d", "output size 1"] = lambda d=dims: call(x(1, 4, *[6] * d), 1)
    CASES[f"max_pool{dims}d", "return_indices=True"] = lambda d=dims: call(x(1, 4, *[6] * d), 2, return_indices=True)
for name in ("relu", "leaky_relu", "relu6", "hardtanh"):
    CASES[name, IN_PLACE] = lambda: call(x()[0], inplace=True)

PHRASES = [(row, phrase) for row in ROWS for phrase in row.plain]
ELSEWHERE = [(row, phrase) for row, phrase in PHRASES if phrase in (MIXED, AUTOCAST)]
ids = [f"{row.name}-{phrase}" for row, phrase in ELSEWHERE]


def test_every_phrase_has_a_case_and_every_case_a_phrase():
    assert {(row.name, phrase) for row, phrase in PHRASES if phrase not in (MIXED, AUTOCAST)} == CASES.keys()


@pytest.mark.parametrize(("name", "phrase"), CASES, ids=" ".join)
def test_left_to_torch(name, phrase):
    (row,) = (row for row in ROWS if row.name == name)
    args, options = CASES[name, phrase]()
    assert row.call(Recording(), *args, **options) is NotImplemented


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device."""

    home = "cpu"

    @property
    def device(self):
        return torch.device(self.home)

    @property
    def is_cuda(self):
        return self.home == "cuda"


@pytest.mark.parametrize(("row", "phrase"), ELSEWHERE, ids=ids)
def test_left_to_torch_on_devices_that_are_not_here(row, phrase, monkeypatch):
    """Without what the phrase names, the same call is not left."""
    monkeypatch.setattr(_nodes, "_TYPES", (*_nodes._TYPES, Elsewhere))
    monkeypatch.setattr(Elsewhere, "home", "cuda" if phrase == MIXED else "xpu")
    shapes, options = rows.CASES[row.name][0]
    first, *rest = shapes.values()
    for left in (False, True):
        low = torch.float32 if phrase == MIXED and left else torch.float64
        weights = [torch.ones(shape, dtype=low) for shape in rest]
        options = dict(options) | dict(zip(list(shapes)[1:], weights, strict=True))
        torch.set_autocast_enabled("xpu", phrase == AUTOCAST and left)
        try:
            result = row.call(Recording(), x(*first).as_subclass(Elsewhere), **options)
        finally:
            torch.set_autocast_enabled("xpu", False)
        assert (result is NotImplemented) == left
