"""Memory layouts the kernels accept: contiguous or channels_last, the batch outermost in both."""

import torch


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """The layout in which `x` can be used with the fewest copies."""
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and per-sample values: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
