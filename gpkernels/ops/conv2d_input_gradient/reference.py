"""conv2d_input_gradient in plain torch: the specification, and what other devices run."""

import torch
from torch import Tensor


def conv2d_input_gradient(
    grad_out: Tensor, weight: Tensor, input: Tensor, stride: list[int], padding: list[int]
) -> Tensor:
    """w^T g for y = w * x, a convolution without dilation and groups; of `input` only shape and layout are used.

    Shapes: grad_out (N, O, H', W'), weight (O, C, h, w), input and result (N, C, H, W).
    """
    options = (stride, padding, [1, 1], False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(grad_out, input, weight, None, *options, (True, False, False))[0]
