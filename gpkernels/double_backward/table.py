"""The table: which functions of torch are rerouted, by which row, and what becomes of their derivatives.

A row is called as the torch function is, with the `Recording` first, and returns NotImplemented for a call that it
leaves to plain torch. To add one: write the row beside its like (or a new pair of Functions, each of which names the
derivatives of the other), add it here, and to `tests/test_double_backward.py`, which tries every row of this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from gpkernels.double_backward import attention, bilinear, curved, norms, pointwise, pooling


@dataclass(frozen=True)
class Row:
    """`curved`: whether the second derivative sends something back to the input. `needed`: torch's own function has no
    second derivative. `plain`: the calls left to torch, beside those of `_nodes.reroutable`; tried by the tests. The
    rest is for readers."""

    name: str
    functions: tuple[Callable[..., Any], ...]
    call: Callable[..., Any]
    curved: bool
    gain: str
    plain: tuple[str, ...]
    needed: bool = False


_BILINEAR = "no zero stream, no unused weight gradient, weight gradients by the weight-gradient primitive"
_FLAT = "no zero stream; the input is not kept"
_CURVED = "the first derivative is one kernel and keeps one tensor; the second is written out"
_NORM = "two fused kernels instead of some fifty; a (leaky) ReLU right after it is fused in"
_MATH = "has a second derivative at all: the math kernel instead of a fused one"
_SDPA, _MHA = F.scaled_dot_product_attention, F.multi_head_attention_forward
_EVALUATED = f"{_NORM}; in evaluation plain operations without zero streams"
_BATCHED, _EVEN = "input without a batch dimension", "padding='same' of even size"
_IN_PLACE, _BOUND = "in place on a view", "a bound that the dtype cannot hold"
_AUTOCAST = "autocast on another device than CPU and CUDA"
_ONE, _INDICES = "output size 1", "return_indices=True"
_MIXED = "parameters of another dtype on CUDA"
_PRELU = ("neither one slope nor one a channel", "slopes of two dimensions")
_BATCH_NORM = (
    "a vector as input",
    "parameters or statistics of another shape than (C,)",
    "training on one value a channel",
    "evaluation without statistics",
    "evaluation with statistics that require grad",
)
_INSTANCE_NORM = ("running statistics", "one value a channel", "input without a spatial dimension", _MIXED, _AUTOCAST)
_GROUP_NORM = ("one value a group", _MIXED, _AUTOCAST)

ROWS = (
    Row("conv1d", (F.conv1d,), bilinear.convolution(1), False, _BILINEAR, (_BATCHED, _EVEN)),
    Row("conv2d", (F.conv2d,), bilinear.convolution(2), False, _BILINEAR, (_BATCHED, _EVEN)),
    Row("conv3d", (F.conv3d,), bilinear.convolution(3), False, _BILINEAR, (_BATCHED, _EVEN)),
    Row("conv_transpose1d", (F.conv_transpose1d,), bilinear.transposed_convolution(1), False, _BILINEAR, (_BATCHED,)),
    Row("conv_transpose2d", (F.conv_transpose2d,), bilinear.transposed_convolution(2), False, _BILINEAR, (_BATCHED,)),
    Row("conv_transpose3d", (F.conv_transpose3d,), bilinear.transposed_convolution(3), False, _BILINEAR, (_BATCHED,)),
    Row("linear", (F.linear,), bilinear.linear, False, _BILINEAR, ("a vector as input", "a vector as weight")),
    Row("relu", (F.relu, torch.relu, torch.Tensor.relu), pointwise.relu, False, _FLAT, (_IN_PLACE,)),
    Row("relu_", (F.relu_, torch.relu_, torch.Tensor.relu_), pointwise.relu_, False, _FLAT, (_IN_PLACE,)),
    Row("leaky_relu", (F.leaky_relu,), pointwise.leaky_relu, False, _FLAT, ("a negative slope", _IN_PLACE)),
    Row("relu6", (F.relu6,), pointwise.relu6, False, _FLAT, (_IN_PLACE,)),
    Row("hardtanh", (F.hardtanh,), pointwise.hardtanh, False, _FLAT, (_BOUND, _IN_PLACE)),
    Row("prelu", (F.prelu, torch.prelu, torch.Tensor.prelu), pointwise.prelu, False, "no zero stream", _PRELU),
    Row("silu", (F.silu,), curved.silu, True, _CURVED, ("in place", _AUTOCAST)),
    Row("gelu", (F.gelu,), curved.gelu, True, _CURVED, (_AUTOCAST,)),
    Row("tanh", (torch.tanh, F.tanh, torch.Tensor.tanh), curved.tanh, True, _CURVED, (_AUTOCAST,)),
    Row("softplus", (F.softplus,), curved.softplus, True, _CURVED, (_AUTOCAST,)),
    Row("avg_pool1d", (F.avg_pool1d,), pooling.average1d, False, _FLAT, (_BATCHED,)),
    Row("avg_pool2d", (F.avg_pool2d,), pooling.average(2), False, _FLAT, (_BATCHED,)),
    Row("avg_pool3d", (F.avg_pool3d,), pooling.average(3), False, _FLAT, (_BATCHED,)),
    Row("adaptive_avg_pool1d", (F.adaptive_avg_pool1d,), pooling.adaptive_average1d, False, _FLAT, (_BATCHED, _ONE)),
    Row("adaptive_avg_pool2d", (F.adaptive_avg_pool2d,), pooling.adaptive_average(2), False, _FLAT, (_BATCHED, _ONE)),
    Row("adaptive_avg_pool3d", (F.adaptive_avg_pool3d,), pooling.adaptive_average(3), False, _FLAT, (_BATCHED, _ONE)),
    Row("max_pool1d", (F.max_pool1d, torch.max_pool1d), pooling.maximum1d, False, _FLAT, (_BATCHED, _INDICES)),
    Row("max_pool2d", (F.max_pool2d, torch.max_pool2d), pooling.maximum(2), False, _FLAT, (_BATCHED, _INDICES)),
    Row("max_pool3d", (F.max_pool3d, torch.max_pool3d), pooling.maximum(3), False, _FLAT, (_BATCHED, _INDICES)),
    Row("batch_norm", (F.batch_norm,), norms.batch_norm, True, _EVALUATED, _BATCH_NORM),
    Row("instance_norm", (F.instance_norm,), norms.instance_norm, True, _NORM, _INSTANCE_NORM),
    Row("layer_norm", (F.layer_norm,), norms.layer_norm, True, _NORM, (_AUTOCAST,)),
    Row("group_norm", (F.group_norm,), norms.group_norm, True, _NORM, _GROUP_NORM),
    Row("scaled_dot_product_attention", (_SDPA,), attention.by_math(_SDPA), True, _MATH, (), needed=True),
    Row("multi_head_attention_forward", (_MHA,), attention.by_math(_MHA), True, _MATH, (), needed=True),
)

BY_FUNCTION = {function: row for row in ROWS for function in row.functions}
NEEDED = {function: row for function, row in BY_FUNCTION.items() if row.needed}
