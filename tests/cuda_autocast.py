"""The second-order engine under CUDA's autocast, on fake tensors: dtypes, shapes and devices, without numbers.

`python tests/cuda_autocast.py PART`, with the library of `shim.build.fake_cuda` preloaded.
"""

import contextlib
import importlib.util
import itertools
import os
import sys

import plain
import rows
import torch
import zoo
from test_double_backward import ROWS, call, is_ours, leaves_and_options
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import gpkernels as gp
from gpkernels.double_backward import _nodes, mode

HALF = torch.float16
KINDS = [(HALF, torch.float32), (HALF, HALF), (torch.bfloat16, torch.float64)]
"""autocast's dtype and the input's."""
PLAIN = {"prelu", "scaled_dot_product_attention"}
"""Rows made of torch's own calls."""


@contextlib.contextmanager
def autocast(dtype):
    """torch.autocast("cuda", dtype), which turns itself off without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def fake(x, dtype):
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda")


def look(tensors):
    return [(t.dtype, t.device.type, t.shape) for t in tensors]


def looks_of_row(row, low, dtype, shapes, options, block):
    """Of the result, for an input of that dtype and parameters of float32, and of two derivatives; whether the engine
    made it."""
    leaves, others = leaves_and_options(shapes, options)
    first = next(iter(leaves))
    with FakeTensorMode():
        leaves = {n: fake(t, dtype if n == first else torch.float32).requires_grad_() for n, t in leaves.items()}
        others = {n: fake(v, torch.float32) if isinstance(v, torch.Tensor) else v for n, v in others.items()}
        inputs = list(leaves.values())
        with autocast(low), block:
            y = call(row, row.functions[0], leaves, others, lambda h: h, True)
        once = plain.gradients(y.float().sin().sum(), inputs, create_graph=True)
        twice = plain.gradients(sum(g.float().sin().sum() for g in once), inputs)
        return look((y, *once, *twice)), is_ours(y)


def every_row():
    same, rerouted = 0, set()
    for row in ROWS[:-1]:
        for (low, dtype), case in itertools.product(KINDS, rows.CASES[row.name]):
            arguments = (row, low, dtype, *case)
            try:
                wanted, _ = looks_of_row(*arguments, torch.enable_grad())
            except RuntimeError:  # as torch's derivatives of some norms do
                continue
            got, ours = looks_of_row(*arguments, gp.fast_double_backward())
            assert got == wanted, arguments
            same += 1
            if ours:
                rerouted.add(row.name)
    assert {row.name for row in ROWS[:-1]} - rerouted == PLAIN, rerouted
    print(f"compared {same} cases")


def looks_of_critic(name, run):
    """Of the scores and of the gradients of loss and penalty; the penalty is float32."""
    build, shape, classes = zoo.ZOO[name]
    with FakeTensorMode(), torch.device("cuda"):
        critic, x = build(), torch.randn(4, *shape)
        kwargs = {key: torch.randint(count, (4,)) for key, count in classes.items()}
        with autocast(HALF):
            if run == "plain":
                scores, penalty = plain.scores_and_penalty(critic, x, **kwargs)
            elif run == "joint":
                scores, penalty = gp.score_and_penalty(critic, x, critic_kwargs=kwargs)
            else:
                scores = critic(x, **kwargs)
                penalty = gp.gradient_penalty(critic, x, kind="r1", critic_kwargs=kwargs)
        assert penalty.dtype == torch.float32, (name, run)
        assert is_ours(scores) == (run == "joint"), (name, run)
        (scores.float().square().sum() + penalty).backward()
        return look((scores, *(p.grad for p in critic.parameters())))


def every_critic():
    names = [name for name in zoo.ZOO if name != "transformer"]  # copies its layers, and the mode with them
    for name in names:
        wanted = looks_of_critic(name, "plain")
        for run in ("penalty", "joint"):
            assert looks_of_critic(name, run) == wanted, (name, run)
    print(f"compared {len(names)} critics")


def without_kernels():
    """Triton's launchers, which import it when they are first used, make and check tensors as ever, and run nothing."""
    from gpkernels.ops import _triton

    _triton.launch = lambda *args, **constants: None


if __name__ == "__main__":
    if importlib.util.find_spec("triton"):
        without_kernels()
    _nodes._TYPES = (*_nodes._TYPES, FakeTensor)
    mode.SMALL = 0  # the zoo's critics are smaller
    {"rows": every_row, "critics": every_critic}[sys.argv[1]]()
    sys.stdout.flush()
    os._exit(0)  # the thread that autograd has for the device would not end with the interpreter
