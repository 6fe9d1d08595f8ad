"""The norm of a convolution as an operator on images of one size, instead of that of its reshaped weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from gpkernels._checks import fail
from gpkernels.ops._layout import accumulation_dtype
from gpkernels.ops.spectral_norm.autograd import without_autocast
from gpkernels.spectral import steps
from gpkernels.spectral.portable import Owned
from gpkernels.spectral.vectors import START

_FORWARD: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class Convolution:
    """What a convolution does to inputs of one shape, (channels, *spatial), but for its weight."""

    shape: tuple[int, ...]
    transposed: bool
    options: dict[str, Any]
    padding: tuple[int, ...] = ()  # of F.pad, where the module does not pad with zeros
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: nn.Module, input_shape: Sequence[int]) -> Convolution:
        if not isinstance(module, nn.modules.conv._ConvNd):
            raise TypeError(f"module: wanted a convolution, got {type(module).__name__}")
        shape, spatial = tuple(input_shape), len(module.kernel_size)
        if len(shape) == spatial:
            shape = (module.in_channels, *shape)
        if len(shape) != spatial + 1 or shape[0] != module.in_channels or min(shape) < 1:
            wanted = f"({module.in_channels}, *spatial) with {spatial} spatial sizes, or these alone"
            raise fail("input_shape", wanted, tuple(input_shape))
        options: dict[str, Any] = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
        if module.transposed:
            return cls(shape, True, {**options, "padding": module.padding, "output_padding": module.output_padding})
        if module.padding_mode != "zeros":
            return cls(shape, False, options, tuple(module._reversed_padding_repeated_twice), module.padding_mode)
        return cls(shape, False, {**options, "padding": module.padding})

    def __call__(self, weight: Tensor, x: Tensor) -> Tensor:
        """x of shape (1, *shape)."""
        if self.padding:
            x = F.pad(x, self.padding, mode=self.padding_mode)
        call = (_TRANSPOSED if self.transposed else _FORWARD)[weight.dim() - 3]
        return call(x, weight, **self.options)

    def wide(self, weight: Tensor) -> Tensor:
        return weight.to(accumulation_dtype(weight.dtype))

    def start(self, weight: Tensor) -> Tensor:
        """A direction to start from, of length 1, drawn without touching torch's generators."""
        x = torch.randn(1, *self.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype, device="cpu")
        return (x / torch.linalg.vector_norm(x)).to(weight.device)

    def iterate(self, weight: Tensor, x: Tensor, eps: float) -> Tensor:
        """The direction of A^T A x; x itself where that vanishes."""
        with torch.inference_mode(False), torch.enable_grad():
            start = x.clone()  # an inference tensor takes no gradient
            x = start.detach().requires_grad_()
            y = self(weight.clone() if weight.is_inference() else weight.detach(), x)
            (image,) = torch.autograd.grad(y, x, y.detach())
        length = torch.linalg.vector_norm(image)  # of the order of the norm's square
        return torch.where(length.sqrt() > eps, image / length, start)


class ConvolutionNorm(Owned):
    """target W / ||A_W|| with A_W the convolution as an operator on inputs of one shape.

    Buffer: `_x` (1, channels, *spatial), its leading right singular vector, float32 (float64 for a float64 weight). An
    update costs a convolution and its adjoint at batch size 1, a read one convolution more; layers are not grouped.
    Highest gradient order: any, in W, with x and A x / ||A x|| as constants of the first.
    """

    vectors = ("_x",)
    _x: Tensor

    def __init__(
        self, weight: Tensor, convolution: Convolution, *, iterations: int, eps: float, target: float, at_reads: bool
    ) -> None:
        super().__init__()
        self.convolution, self.iterations, self.eps, self.target = convolution, iterations, eps, target
        self.at_reads = at_reads
        self.register_buffer("_x", convolution.start(convolution.wide(weight.detach())))
        if not weight.is_meta:
            self.restart(weight.detach())

    def attach(self, owner: ParametrizationList) -> None:
        super().attach(owner)
        steps.watch(self)

    def restart(self, weight: Tensor) -> None:
        self.fit(weight)
        wide = self.convolution.wide(weight)
        self._x.copy_(self.convolution.start(wide))
        self._iterate(wide, START)

    def watched(self) -> list[tuple[ConvolutionNorm, Tensor]]:
        weight = self.original()
        return [] if self.at_reads or weight is None else [(self, weight)]

    def settle(self, members: Sequence[ConvolutionNorm]) -> None:
        """A fresh layer whose weight has been changed gets another x, so that ranks that were given one weight have one
        x; any other takes up the change with its iterations."""
        for weight in [w for m, w in self.watched() if m.known.fresh and not w.is_meta]:
            self.restart(weight.detach())

    def stepped(self, members: Sequence[ConvolutionNorm]) -> None:
        for _, weight in self.watched():
            self.update(weight)

    def update(self, weight: Tensor, iterations: int | None = None) -> None:
        """Moves x by so many iterations for a weight."""
        self.fit(weight)
        self._iterate(self.convolution.wide(weight.detach()), self.iterations if iterations is None else iterations)
        own = self.original()
        if own is not None:
            self.remember(own)
            self.known.at, self.known.fresh = steps.tick(), False

    @torch.no_grad()
    def _iterate(self, weight: Tensor, iterations: int) -> None:
        with without_autocast(weight):
            for _ in range(iterations):
                self._x.copy_(self.convolution.iterate(weight, self._x.to(weight.dtype), self.eps))

    def measure(self, weight: Tensor) -> Tensor:
        return self._squares(self.convolution.wide(weight)).sqrt()

    def _squares(self, weight: Tensor) -> Tensor:
        x = self._x.detach().to(weight.dtype, copy=True)
        x = x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
        return self.convolution(weight, x).square().sum()

    def forward(self, weight: Tensor) -> Tensor:
        return self.read(weight)

    def read(self, weight: Tensor) -> Tensor:
        with without_autocast(weight):
            wide = self.convolution.wide(weight)
            if self.at_reads and self.training:
                self._iterate(wide.detach(), self.iterations)
            squares = self._squares(wide)
            dead = squares <= self.eps**2
            return (wide * (self.target / squares.masked_fill(dead, 1.0).sqrt())).to(weight.dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        steps.watch(self)
