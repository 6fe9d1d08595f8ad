"""pairwise_cost: C(margin ||real - fake||_1 + loss_real - loss_fake) for pairs of samples."""

from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops._library import define
from gpkernels.ops._rows import register_backends
from gpkernels.ops.pairwise_cost import reference


def _fake(real, fake, loss_real, loss_fake, margin, slope):
    return tuple(real.new_empty(real.shape[:1], dtype=accumulation_dtype(real.dtype)) for _ in range(3))


def _fake_backward(grad_cost, slope_at):
    return slope_at.new_empty(slope_at.shape), slope_at.new_empty(slope_at.shape)


define(
    "pairwise_cost(Tensor real, Tensor fake, Tensor loss_real, Tensor loss_fake, float margin, float slope)"
    " -> (Tensor cost, Tensor delta, Tensor slope_at)",
    reference.pairwise_cost,
    _fake,
)
define(
    "pairwise_cost_backward(Tensor grad_cost, Tensor slope_at) -> (Tensor grad_loss_real, Tensor grad_loss_fake)",
    reference.pairwise_cost_backward,
    _fake_backward,
)

register_backends("pairwise_cost", reference, ("pairwise_cost", "pairwise_cost_backward"))
