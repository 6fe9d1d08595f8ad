"""BatchNorm whose statistics are those of all processes' samples, with derivatives of every order, on any device.

torch's own SyncBatchNorm runs on GPUs alone (on a CPU several processes get a ValueError), and its backward consists of
operations that have no derivative, so a gradient penalty cannot go through it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


class _Synchronised(_BatchNorm):
    """torch's BatchNorm of the samples of all processes, each of which has equally many. Its state is torch's.

    x has shape (B, C, ...). One exchange of 2 numbers a channel in the forward, one in each backward. In eval mode, and
    alone, torch's BatchNorm itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.to(accumulation_dtype(x.dtype))
        each = AllGather.apply(torch.stack(torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)))
        means = each[:, 1]
        # of parts of equal size: the mean of the variances and the variance of the means
        mean, variance = means.mean(0), each[:, 0].mean(0) + means.var(0, correction=0)
        self._track(mean.detach(), variance.detach(), len(each) * (x.numel() // x.shape[1]))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        a_channel = (-1, *[1] * (x.dim() - 2))
        y = (wide - mean.view(a_channel)) * scale.view(a_channel)
        if self.affine:
            y = y + self.bias.view(a_channel)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), weight)


class SyncBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    pass


class SyncBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    pass


class SyncBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    pass


_SYNCHRONISED: dict[type, type] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def synchronise(net: nn.Module) -> None:
    """Makes every BatchNorm1d, 2d and 3d of `net`, itself among them, one of the samples of all processes.

    The modules stay the same objects, so that hooks and other references to them go on to hold; classes derived from
    torch's stay as they are.
    """
    for module in net.modules():
        module.__class__ = _SYNCHRONISED.get(type(module), type(module))
