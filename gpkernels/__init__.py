"""gpkernels: exact gradient penalties for GAN training, on the critic you already have."""

from gpkernels import _native, losses
from gpkernels import ops as _ops  # noqa: F401  defines the schemas that the native library implements
from gpkernels._version import __version__
from gpkernels.double_backward import fast_double_backward
from gpkernels.functional import grad_norm, grad_norm_penalty, interpolate, pairwise_cost, perturb
from gpkernels.graphs import graphed
from gpkernels.nn import GradientPenalty
from gpkernels.penalty import gradient_penalty, score_and_penalty
from gpkernels.registry import BackendError, backend, why_not
from gpkernels.spectral import (
    convolution_norm,
    singular_values,
    spectral_norm,
    spectral_norm_all,
    spectral_norm_handle,
    spectral_normalize,
)

_native.load()

__all__ = [
    "BackendError",
    "GradientPenalty",
    "__version__",
    "backend",
    "convolution_norm",
    "fast_double_backward",
    "grad_norm",
    "grad_norm_penalty",
    "gradient_penalty",
    "graphed",
    "interpolate",
    "losses",
    "pairwise_cost",
    "perturb",
    "score_and_penalty",
    "singular_values",
    "spectral_norm",
    "spectral_norm_all",
    "spectral_norm_handle",
    "spectral_normalize",
    "why_not",
]
