"""Spectral norm for whole networks: W / sigma(W), with the vectors moved once per optimizer step.

Why a step hook. A GAN step reads every critic weight several times (real, fake, penalty, generator). Where reading
iterates, as in torch, these forwards see different weights, evaluation and logging change the next step, and the
vectors of a checkpoint belong to older weights. Here u and v move when the weights do: hooks on every
`torch.optim.Optimizer` (`steps`) give the weights that a step has changed one power iteration, those of modules in
training mode only.

Why reading is pure. u and v then always belong to the current weights, so W / sigma is a function of the state dict: a
reloaded model goes on to the same bits, evaluation freezes, and any number of forwards sees one sigma. It also lets
the layers of a network share their work: the call that moves the vectors of a `group` leaves its normalised weights,
made while the weights were in the caches, and real, fake and penalty forwards share these `results`, one autograd node
for all of them. Where no update came before, the first read of a pass computes every layer in one call.

When a result is kept. In training mode, after an update: until the version or the address of the weight, u or v moves.
Such weights may be written through `.data`, which moves neither, by an optimizer's step alone: call `handle.update()`
after anything else. In training mode before the first update, or with u and v written since, as
DistributedDataParallel does: until the next step of any optimizer, or, of new layers and copies, as long as a graph
holds it. Else (evaluation, reads without gradients, copies, averages) every pass over the network measures sigma anew,
with u and v taken as directions of any length, and changes nothing.

A weight that is replaced without its u and v:
- assigned (module.weight = x), or loaded from a state dict without them: both are made anew at once;
- written in place (nn.init on the original, a broadcast, an average's weights): where they do not fit (`misfits`),
  reads measure with new ones, and the next optimizer step makes them anew first (`Group.settle`); always if no step or
  load has moved them yet, so that they are a function of the weight and equal on all ranks;
- with update="read", assigned or written: nothing, as in torch, but that sigma counts without its sign;
- with norm="convolution", written: `_x` catches up by its iterations, but for one that no step has moved;
- under compilers and transforms, and in the capture of a CUDA graph, nothing can be asked: u and v as they are.

`parametrization` holds the module, under the buffer names of torch's own; `register` how weights get it, `vectors`
what u and v are outside of it, `convolution` the operator norm of a convolution, `measure` singular values,
`checkpoints` the names of other libraries.
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
