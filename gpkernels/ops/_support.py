"""Predicates shared by the registry rows."""

from typing import Any

import torch

from gpkernels import _native

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def under_transform() -> bool:
    """True inside torch.func transforms (grad, vmap, ...), which see through plain torch code only."""
    return torch._C._are_functorch_transforms_active()


def always(tensor: torch.Tensor, **options: Any) -> tuple[bool, str]:
    return True, ""


def native_cpu(tensor: torch.Tensor, **options: Any) -> tuple[bool, str]:
    if _native.missing:
        return False, _native.missing
    if tensor.device.type != "cpu":
        return False, f"it runs on CPU tensors, got one on {tensor.device.type}"
    if tensor.dtype not in NATIVE_DTYPES:
        return False, f"it runs on float16, bfloat16, float32 and float64, got {tensor.dtype}"
    if under_transform():
        return False, "torch.func transforms are active, which trace the reference only"
    return True, ""
