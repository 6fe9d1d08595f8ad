"""A CUDA graph's stand-in on the CPU: a recording of the device's calls, which replays them on the same memory.

As in a graph, whatever Python decided is fixed at the recording, results lie where the recording put them, and nothing
can be read back; unlike in one, random numbers come from torch's CPU generator. What Python does between the calls of
a step (counting, choosing, keeping a tensor for later) is done once, so a step that needs it goes wrong in a replay.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from gpkernels import graphs
from gpkernels.spectral import results

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")
UNDECLARED = ("running_mean", "running_var")
"""Arguments that batch norms write without saying so in their schema."""


class Tape(TorchDispatchMode):
    """Records what runs inside it, leaves no trace of that, and runs it with `replay`."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __enter__(self):
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.split("::")[1] in READS:
            raise RuntimeError(f"{func} waits for the device")
        names = [argument.name for argument in func._schema.arguments]
        for argument, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            alias = func._schema.arguments[names.index(argument)].alias_info
            if (alias is not None and alias.is_write) or argument in UNDECLARED:
                self._written(value)
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def _written(self, value):
        for x in tree_leaves(value):
            if isinstance(x, torch.Tensor):
                memory = x.untyped_storage()
                self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))

    def __exit__(self, *error):
        super().__exit__(*error)
        for memory, content in self.before.values():
            memory.copy_(content)
        torch.set_rng_state(self.random)

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                for x, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(x, torch.Tensor) and x.data_ptr() != value.data_ptr():
                        x.copy_(value)


class Taped(graphs._Graphed):
    """`gp.graphed`, whose graph is a tape."""

    def __init__(self, step, warmup=3, generators=()):
        super().__init__(step, warmup, generators)

    def _on_a_stream_of_its_own(self, inputs):
        return self.step(*inputs)

    def _capture(self, inputs):
        self.inputs = tuple(x.detach().clone() for x in inputs)
        with Tape() as self.graph:
            self.result = self.step(*self.inputs)


@pytest.fixture
def on_tape(monkeypatch):
    """Graphs take tensors of a CPU, and a recording counts as the capture of a stream."""
    monkeypatch.setattr(graphs, "_check_inputs", lambda inputs, captured: None)
    monkeypatch.setattr(results, "capturing", lambda x: isinstance(_get_current_dispatch_mode(), Tape))
