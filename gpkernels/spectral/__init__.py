"""Spectral norm for whole networks: W / sigma(W), with the vectors moved once per optimizer step.

Why a step hook. A GAN step reads every critic weight several times (real, fake, penalty, generator). Where reading
iterates, as in torch, these forwards see different weights, evaluation and logging change the next step, and the
vectors of a checkpoint belong to older weights. Here u and v move when the weights do: hooks on every
`torch.optim.Optimizer` (`steps`) give the weights that a step has changed one power iteration, those of modules in
training mode only.

Why reading is pure. u and v then always belong to the current weights, so W / sigma is a function of the state dict: a
reloaded model goes on to the same bits, evaluation freezes, and any number of forwards sees one sigma. It also lets
the layers of a network share their work: the first read of a step computes every layer of the `group` in one call, and
real, fake and penalty forwards share the results, one autograd node for all of them.

A result is kept for all reads while it is known to be right: after an update, or with gradients in training mode,
until the version or the address of a weight, u or v moves. In any other state (copies, averages, loaded weights in
evaluation) every pass over the network measures sigma anew, with u and v taken as directions of any length, and changes
nothing: so averages may be written through `.data`, which no version shows. Weights in training may not, except by an
optimizer's step: call `handle.update()` after it.

`parametrization` holds the module, under the buffer names of torch's own; `convolution` the operator norm of a
convolution, `measure` singular values, `checkpoints` the names of other libraries.
"""

from gpkernels.spectral.api import Handle, spectral_norm, spectral_norm_all, spectral_norm_handle, spectral_normalize
from gpkernels.spectral.measure import convolution_norm, singular_values
from gpkernels.spectral.parametrization import SpectralNorm

__all__ = [
    "Handle",
    "SpectralNorm",
    "convolution_norm",
    "singular_values",
    "spectral_norm",
    "spectral_norm_all",
    "spectral_norm_handle",
    "spectral_normalize",
]
