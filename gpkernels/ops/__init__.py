"""One op, one folder: `reference.py` (plain torch), `autograd.py` (the Functions), `__init__.py` (its rows)."""

from gpkernels.ops import grad_penalty, interpolate, norm_act, pairwise_cost, perturb, spectral_norm

__all__ = ["grad_penalty", "interpolate", "norm_act", "pairwise_cost", "perturb", "spectral_norm"]
