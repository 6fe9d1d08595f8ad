"""The second-order engine: what makes `create_graph=True` cost little, on critics nobody changed.

A penalty differentiates twice through the critic. Autograd does so correctly and wastefully: activations and pools
return zeros for the second derivative in their input, on which full convolutions then run; a convolution's double
backward makes its weight gradient with an image-sized kernel; a norm's is fifty small kernels. Here, while a penalty
runs the critic, a TorchFunctionMode (`mode`) sees each call of torch and swaps those in a `table` for autograd
Functions that compute the same and know better second derivatives: `bilinear` (convolutions, linear), `pointwise`,
`curved`, `pooling`, `norms`. Autograd still composes them, so unknown calls, hooks, views and shared weights work as
ever, and a critic may be known in part. `sharing` then merges the backward of scores and penalty where the whole critic
is known.

Other designs were weighed. Module hooks miss functional calls. A traced joint graph must be traced again for every
shape and does not see hooks or buffers. A tape of its own, with sweeps instead of autograd, reaches the same counts of
convolutions, but a critic with one unknown call is lost to it, and it needs a rule for every view and addition that
autograd already has.
"""

from gpkernels.double_backward._nodes import Entry, Recording
from gpkernels.double_backward.mode import fast_double_backward, never_compiled, pays, rerouted
from gpkernels.double_backward.sharing import share

__all__ = ["Entry", "Recording", "fast_double_backward", "never_compiled", "pays", "rerouted", "share"]
