"""gpkernels: exact gradient penalties for GAN training, on the critic you already have."""

from gpkernels import _native
from gpkernels import ops as _ops  # defines the schemas, which the native library then implements
from gpkernels._version import __version__
from gpkernels.functional import grad_norm, grad_norm_penalty, interpolate, perturb
from gpkernels.registry import BackendError, backend, why_not

_native.load()

__all__ = [
    "BackendError",
    "__version__",
    "backend",
    "grad_norm",
    "grad_norm_penalty",
    "interpolate",
    "perturb",
    "why_not",
]
