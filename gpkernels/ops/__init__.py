"""One op, one folder: `reference.py` (plain torch), `autograd.py` (the Functions), `__init__.py` (its rows)."""

from gpkernels.ops import (
    conv2d_input_gradient,
    grad_penalty,
    interpolate,
    norm_act,
    pairwise_cost,
    perturb,
    spectral_norm,
)

__all__ = [
    "conv2d_input_gradient",
    "grad_penalty",
    "interpolate",
    "norm_act",
    "pairwise_cost",
    "perturb",
    "spectral_norm",
]
