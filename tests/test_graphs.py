"""gp.graphed where there is no GPU: its refusals. `tests/test_gpu.py` has the rest."""

import pytest
import torch

import gpkernels as gp


def test_refuses_what_a_cuda_graph_cannot_hold():
    with pytest.raises(TypeError, match="step: wanted a callable, got int"):
        gp.graphed(3)
    with pytest.raises(ValueError, match="warmup: wanted a whole number >= 1, got 0"):
        gp.graphed(torch.sin, warmup=0)
    step = gp.graphed(torch.sin)
    with pytest.raises(ValueError, match=r"inputs\[0\]: wanted a CUDA tensor, since graphs are CUDA's, got one on cpu"):
        step(torch.ones(2))
    with pytest.raises(TypeError, match=r"inputs\[0\]: wanted a torch.Tensor, got float"):
        step(1.0)
