"""The processes of a run: which this one is, and what they say to each other. Nothing else in the trainer knows ranks.

Under `torchrun` or `accelerate launch`, `join` makes a process one of several, by Accelerate; elsewhere it is alone,
and the same code runs. Tensors travel by NCCL between GPUs and by gloo between CPUs; what the hosts agree on (whether
to stop, a folder's name) travels by gloo always, so that no process waits for another's GPU.
"""

from __future__ import annotations

import datetime
import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpkernels.errors import UserError
from gpkernels.training.data import Shard

T = TypeVar("T")

_FAILED = "gpkernels/failed"
_PATIENCE = datetime.timedelta(hours=12)
"""How long hosts wait for one that prepares data. One that dies is noticed at once: its connections close."""


class PeerFailed(UserError):
    """Another process of the run has ended; the message says which, and why if it could."""


@dataclass
class Processes:
    """This process, the `index`-th of `count`, and its device. Every process has to make the same calls, in the same
    order; alone, each call gives back what it got."""

    device: torch.device
    index: int = 0
    count: int = 1
    local_index: int = 0  # among those of this machine
    hosts: Any = None  # the group of the hosts' own talk

    def __str__(self) -> str:
        return str(self.device) if self.count == 1 else f"{self.count} processes ({self.device.type})"

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.index == 0

    @property
    def shard(self) -> Shard:
        """This process's part of every batch."""
        return Shard(self.index, self.count)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, without gradient."""
        if self.count == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all processes, along the first dimension, in their order; without gradient."""
        if self.count == 1:
            return part.detach()
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, part.detach().contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether it is True of any process. No process is past this call before all have come to it."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.hosts)
        return bool(flags)

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main process, which alone calls it. The result is pickled between them."""
        if self.count == 1:
            return make()
        said = [make() if self.main else None]
        dist.broadcast_object_list(said, 0, group=self.hosts)
        return said[0]  # type: ignore[return-value]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites them with those of the main process."""
        for tensor in tensors if self.count > 1 else ():
            dist.broadcast(tensor, 0)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Runs the block on one process of each machine, then on its others: what one prepared, they find."""
        if self.count > 1 and self.local_index:
            dist.barrier(self.hosts)
        yield
        if self.count > 1 and not self.local_index:
            dist.barrier(self.hosts)

    def parallel(self, net: nn.Module) -> nn.Module:
        """`net` such that a backward through it leaves in its parameters the mean of the processes' gradients.

        All start from the main process's weights. Buffers stay each process's own: those of spectral norm are functions
        of the weights, and those of BatchNorm agree where it is synchronised.
        """
        if self.count == 1:
            return net
        from accelerate import Accelerator, DistributedDataParallelKwargs

        ours = DistributedDataParallelKwargs(broadcast_buffers=False)
        accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no", kwargs_handlers=[ours])
        with warnings.catch_warnings():  # torch 2.13 has a new name for it, which torch 2.10 and Accelerate have not
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            return accelerator.prepare_model(net, device_placement=False)

    def held(self, net: nn.Module, hold: bool) -> AbstractContextManager[Any]:
        """Forward and backward of a `parallel` net inside it keep gradients here if `hold`: more will be added."""
        if hold and isinstance(net, nn.parallel.DistributedDataParallel):
            return net.no_sync()
        return nullcontext()


_joined: Processes | None = None


def current(device: str) -> Processes:
    """The processes that `join` has joined, if it has; else this one alone on `device`."""
    return _joined or Processes(pick_device(device))


@contextmanager
def join(device: str) -> Iterator[Processes]:
    """Makes this process one of those that a launcher started, for the time of the block; without one it is alone.

    `device` is "auto" or "cuda" (a GPU each) or "cpu". An exception that leaves the block ends the other processes
    too, each with `PeerFailed`: at once where they wait for this one on the host, else by the launcher.
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(pick_device(device))
        return
    state = _initialise(device)
    hosts = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _joined = Processes(state.device, state.process_index, state.num_processes, state.local_process_index, hosts)
    try:
        yield _joined
        dist.barrier(hosts)  # gloo aborts now and then where one leaves while another still talks
    except BaseException as error:
        explained = _explain(_joined.index, error)
        if explained is error:
            raise
        raise explained from None
    finally:
        hosts = _joined.hosts = None  # the last references: its connections close, which the others notice
        _joined = None
        _leave(state)


def _initialise(device: str) -> Any:
    """Accelerate's state of the process. Raises UserError for a device that is not one for each."""
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device: wanted auto, cuda or cpu for several processes, got {device!r}")
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    local_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and torch.cuda.device_count() < local_count:
        raise UserError(
            f"--device: wanted a GPU for each of the {local_count} processes here, got {torch.cuda.device_count()}; "
            "--device cpu trains without"
        )
    try:
        from accelerate import PartialState
    except ModuleNotFoundError:
        raise UserError(
            "several processes want accelerate, which is not installed: pip install 'gpkernels[train]'"
        ) from None
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else Accelerate changes it, and warns
    return PartialState(cpu=on_cpu)


def _leave(state: Any) -> None:
    gc.collect()  # wrapped nets keep the group, whose threads keep tensors: what dies after the interpreter aborts
    state.destroy_process_group()
    state._reset_state()
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def _explain(index: int, error: BaseException) -> BaseException:
    """Leaves word of `error` for the other processes, unless it comes of theirs: then what to raise instead."""
    lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    try:
        store: Any = dist.distributed_c10d._get_default_store()
        if not lost:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            store.set(_FAILED, f"process {index} has ended: {reason}")
        elif store.check([_FAILED]):
            return PeerFailed(store.get(_FAILED).decode())
    except (RuntimeError, ValueError):  # the store has gone with the process that kept it
        pass
    return PeerFailed("another process has ended without a word") if lost else error


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: wanted a device torch can use, got {name!r} ({str(error).splitlines()[0]})"
        ) from None
    return device
