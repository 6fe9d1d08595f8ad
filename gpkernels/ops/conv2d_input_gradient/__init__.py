"""conv2d_input_gradient: the gradient of a 2-D convolution in an input of few channels, on a CPU.

There torch's own takes two to six times as long as the convolution; for more channels, and on other devices, it is as
good. So this is no op of the registry, with backends to choose from, but one kernel that the second-order engine takes
where it wins.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpkernels import _native, registry
from gpkernels._support import under_vmap
from gpkernels.ops._layout import layout_of
from gpkernels.ops._library import define, kernel
from gpkernels.ops.conv2d_input_gradient import reference

define(
    "conv2d_input_gradient(Tensor grad_out, Tensor weight, Tensor input, int[] stride, int[] padding) -> Tensor",
    reference.conv2d_input_gradient,
    lambda grad_out, weight, input, stride, padding: torch.empty_like(input),
)

_kernel = kernel("conv2d_input_gradient")


def most_channels(weight: Tensor, input: Tensor, stride: Sequence[int]) -> int:
    """Channels of the input up to which the kernel was the faster one, on a CPU with AVX-512."""
    if min(stride) == 1:
        return 8
    if any(kernel % step for kernel, step in zip(weight.shape[2:], stride, strict=True)):  # multiplies by zeros, too
        return 32
    return 64 if input.is_contiguous() and input.shape[3] >= 16 else 48


def wins(grad_out: Tensor, weight: Tensor, input: Tensor, stride: Sequence[int]) -> bool:
    """Whether the C++ kernel can run, and is the faster one. Where gradients are recorded it cannot: it has none."""
    return (
        not torch.is_grad_enabled()
        and input.dim() == 4
        and input.shape[1] <= most_channels(weight, input, stride)
        and grad_out.device.type == "cpu"
        and grad_out.dtype in (torch.float32, torch.float64)
        and grad_out.dtype == weight.dtype == input.dtype
        and not _native.missing
        and not under_vmap(grad_out, weight)
        and registry.allows("cpu")
    )


def conv2d_input_gradient(
    grad_out: Tensor, weight: Tensor, input: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """As the reference, where `wins`. The result is contiguous or, where `input` is, channels_last."""
    grad_out = grad_out.contiguous(memory_format=layout_of(grad_out))
    if not input.is_contiguous() and layout_of(input) is torch.contiguous_format:
        input = torch.empty_like(input, memory_format=torch.contiguous_format)
    return _kernel(grad_out, weight, input, stride, padding)
