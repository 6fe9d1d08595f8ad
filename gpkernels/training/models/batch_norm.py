"""BatchNorm whose statistics are those of all processes' samples, with derivatives of every order, on any device.

torch's own SyncBatchNorm runs on GPUs alone (on a CPU several processes get a ValueError), and its backward consists of
operations that have no derivative, so a gradient penalty cannot go through it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpkernels.ops._layout import accumulation_dtype


class AllGather(torch.autograd.Function):
    """x of shape (...) to (processes, ...), the same on each. Highest gradient order: any.

    Its derivative is that of the sum of what the processes compute of it: `SumOwn`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return SumOwn.apply(grad)


class SumOwn(torch.autograd.Function):
    """(processes, ...) to (...): the sum over the processes of the part that is this one's.

    gloo has no reduce-scatter, and the parts are a few numbers a channel. Highest gradient order: any.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return AllGather.apply(grad)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d of the samples of all processes, each of which has equally many. Its state is nn.BatchNorm2d's.

    One exchange of 2 numbers a channel in the forward, one in each backward. In eval mode, and alone, nn.BatchNorm2d
    itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.to(accumulation_dtype(x.dtype))
        each = AllGather.apply(torch.stack(torch.var_mean(wide, (0, 2, 3), correction=0)))
        means = each[:, 1]
        # of parts of equal size: the mean of the variances and the variance of the means
        mean, variance = means.mean(0), each[:, 0].mean(0) + means.var(0, correction=0)
        self._track(mean.detach(), variance.detach(), len(each) * (x.numel() // x.shape[1]))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        y = (wide - mean[:, None, None]) * scale[:, None, None]
        if self.affine:
            y = y + self.bias[:, None, None]
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), weight)


def synchronise(net: nn.Module) -> nn.Module:
    """`net` with every nn.BatchNorm2d in it replaced by a `SyncBatchNorm2d` that has its parameters and buffers."""
    if type(net) is nn.BatchNorm2d:
        synced = SyncBatchNorm2d(net.num_features, net.eps, net.momentum, net.affine, net.track_running_stats)
        synced._parameters, synced._buffers = net._parameters, net._buffers
        return synced.train(net.training)
    for name, child in net.named_children():
        setattr(net, name, synchronise(child))
    return net
