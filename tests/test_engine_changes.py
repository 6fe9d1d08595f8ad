"""Which calls are taken to change an activation's result: all that can, and none of those that people make without."""

import inspect

import plain
import pytest
import torch
import torch.nn.functional as F
from habits import X, net
from plain import float64_on_one_thread  # noqa: F401
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_leaves

import gpkernels as gp
from gpkernels.double_backward.changes import changed

H = (4, 6)
LATER = ((), (2,), (2, 1), ([1, 3],), ([1, 3], 1), ([24],), (torch.float64,))


def functions():
    """Methods of tensors and what torch itself and its operators call, by name."""
    for owner in (torch.Tensor, torch._C._VariableFunctions, torch.ops.aten):
        names = dir(owner)
        if owner is torch.ops.aten:
            names = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")}
        for name in sorted(names):
            function = getattr(owner, name, None)
            if callable(function) and not inspect.isclass(function) and name not in ("__init__", "backward"):
                yield function


def shares_unnoticed(h, results):
    """Whether one of the results has the memory of h, and a change of it that of h no version."""
    for t in tree_leaves(results):
        try:
            shared = t.untyped_storage().data_ptr() == h.untyped_storage().data_ptr()
        except (AttributeError, NotImplementedError):  # no tensor, or one without a storage
            continue
        if shared:
            version = h._version
            increment_version(t)
            if h._version == version:
                return True
    return False


@pytest.mark.filterwarnings("ignore")
def test_what_shares_memory_unnoticed_is_known():
    """Tried on every function of torch, with h as the first argument and as the second."""
    found = []
    for function, later, first in ((f, a, i) for f in functions() for a in LATER for i in (True, False)):
        h, other = torch.randn(H, requires_grad=True) * 1, torch.randn(H)
        args = (h, *later) if first else (other, h)
        try:
            results = function(*args)
        except Exception:  # most of them, of arguments that they do not take
            continue
        if h.shape == H and shares_unnoticed(h, (results, other)):
            found.append(function)
            assert any(t is h for t in tree_leaves(changed(function, args, {}))), function
    assert {"unsafe_chunk", "unsafe_split", "_unsafe_view", "set_"} <= {f.__name__ for f in found}


HARMLESS = {
    "conv2d": lambda h: F.conv2d(h, torch.ones(1, 4, 1, 1)),
    "requires_grad_": lambda h: h.requires_grad_(),
    "interpolate, True by position": lambda h: F.interpolate(h, None, 2.0, "bilinear", True),
    "dropout, training by position": lambda h: F.dropout(h, 0.5, True),
    "elu, not in place": lambda h: F.elu(h, 1.0, False),
    "aten.neg.default": lambda h: torch.ops.aten.neg.default(h),
    "unbind": lambda h: h.unbind(1)[0],
    "another's copy_": lambda h: torch.zeros_like(h).copy_(h),
    "grad_fn": lambda h: h.grad_fn,
    "into another": lambda h: torch.neg(h.new_ones(3), out=h.new_empty(3)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_copies_nothing(name):
    x = X.clone().requires_grad_()
    with gp.fast_double_backward():
        h = F.leaky_relu(x[:, :1].expand(4, 4, 8, 8) * 1, 0.2)
        HARMLESS[name](h)
    assert h.grad_fn.rescued is None


@pytest.mark.parametrize("name", ["data_ptr", "storage", "_typed_storage", "untyped_storage"])
def test_what_hands_out_the_memory_copies(name):
    with gp.fast_double_backward():
        h = F.leaky_relu(X.clone().requires_grad_() * 1, 0.2)
        getattr(h, name)()
    torch.testing.assert_close(h.grad_fn.rescued, h.detach(), rtol=0, atol=0)


def test_what_may_change_is_copied_once():
    with gp.fast_double_backward():
        h = F.leaky_relu(X.clone().requires_grad_() * 1, 0.2)
        node, wanted = h.grad_fn, h.detach().clone()
        h.mul_(2).neg_()
    torch.testing.assert_close(node.rescued, wanted, rtol=0, atol=0)


def doubled(h: torch.Tensor) -> torch.Tensor:
    return h.mul_(-2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("seen", [False, True])
def test_changes_by_torchscript_are_noticed(seen):
    """No mode sees them: without a copy the backward has to raise, also where a change that is seen comes after."""

    scripted = torch.jit.script(doubled)

    def forward(self, x):
        h = F.leaky_relu(self.first(x), 0.2)
        with torch.no_grad():
            scripted(h)
        return self.head((h.neg_() if seen else h * 1).mean((2, 3)))

    critic = net(forward)
    assert not isinstance(plain.outcome(lambda: plain.step(critic, X, False, ours=False)), Exception)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        plain.step(critic, X, False, ours=True)
