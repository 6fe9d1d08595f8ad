"""Predicates shared by the registry rows."""

import functools
import importlib.util
import os
from typing import Any

import torch

from gpkernels import _native

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


under_transform = torch._C._are_functorch_transforms_active
"""True inside torch.func transforms (grad, vmap, ...), which see through plain torch code only."""


def under_vmap(*tensors: torch.Tensor) -> bool:
    """Whether a transform is active or one of these stands for a batch of tensors, as the gradients do under
    torch.autograd.grad(is_grads_batched=True), which is a vmap of its own: then plain torch code alone is right, since
    a kernel or a Function would see, and record, the batch's wrapper."""
    if torch.compiler.is_compiling():
        return False
    return under_transform() or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


def always(tensor: torch.Tensor, **options: Any) -> tuple[bool, str]:
    return True, ""


def native_cpu(tensor: torch.Tensor, **options: Any) -> tuple[bool, str]:
    return _kernels(tensor, "cpu", _native.missing)


def native_cuda(tensor: torch.Tensor, **options: Any) -> tuple[bool, str]:
    return _kernels(tensor, "cuda", _native.cuda_missing)


def triton(tensor: torch.Tensor, **options: Any) -> tuple[bool, str]:
    return _kernels(tensor, "cpu" if interprets_triton() else "cuda", _triton_missing())


def interprets_triton() -> bool:
    """True where Triton's interpreter runs the kernels on CPU tensors (TRITON_INTERPRET=1): for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _kernels(tensor: torch.Tensor, device: str, missing: str) -> tuple[bool, str]:
    if missing:
        return False, missing
    if tensor.device.type != device:
        return False, f"it runs on {device} tensors, got one on {tensor.device.type}"
    if tensor.dtype not in NATIVE_DTYPES:
        return False, f"it runs on float16, bfloat16, float32 and float64, got {tensor.dtype}"
    if under_transform():
        return False, "torch.func transforms are active, which trace the reference only"
    return True, ""
