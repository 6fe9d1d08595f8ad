"""Whether images show faces: the last stage of MTCNN (Zhang et al. 2016), from the weights in facenet-pytorch.

facenet-pytorch is never imported (it needs torchvision); its onet.pt is read as a file.
"""

from __future__ import annotations

import importlib.metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels._checks import fail
from gpkernels.metrics.features import package_file
from gpkernels.metrics.images import rgb
from gpkernels.pixels import to_float

Box = tuple[float, float, float, float]

CELEBA_BOXES: dict[str, Box | None] = {
    "178": (0.24, 0.30, 0.84, 0.90),
    "none": (0.24, 0.30, 0.84, 0.90),
    "148": (0.19, 0.26, 0.91, 0.98),
    "140": (0.17, 0.25, 0.93, 1.00),
    "128": (0.14, 0.13, 0.97, 0.96),
    "108": None,
}
"""Where the detector looks in a crop of aligned CelebA: left, upper, right, lower as shares of the side; the same
pixels of the photograph for all but 108, whose whole frame is near enough."""

NOTES = (
    "the face detector was trained partly on CelebA, so it favours models trained on CelebA",
    "a rate of faces says nothing about their variety: one face repeated scores as well as many",
)
_SIZE = 48


class ONet:
    """MTCNN's output network: the probability of a face in each image, shape (N,)."""

    def __init__(self, device: torch.device) -> None:
        file = package_file("facenet_pytorch", "data/onet.pt", "--no-deps facenet-pytorch")
        self.device = device
        self.weights: dict[str, Tensor] = torch.load(file, map_location=device, weights_only=True)
        self.description = f"onet.pt (facenet-pytorch {importlib.metadata.version('facenet-pytorch')}), 48x48"

    def __call__(self, images: Tensor, box: Box | None = None) -> Tensor:
        """images: uint8, (N, C, H, W); box: the part to look at, None for the whole frame."""
        if box is not None:
            left, upper, right, lower = box
            if not (0 <= left < right <= 1 and 0 <= upper < lower <= 1):
                raise fail("box", "shares of the side, left < right and upper < lower", box)
            height, width = images.shape[2:]
            images = images[
                :, :, round(upper * height) : round(lower * height), round(left * width) : round(right * width)
            ]
        with torch.no_grad():
            return torch.cat([self._probability(part.to(self.device)).cpu() for part in images.split(64)])

    def _probability(self, images: Tensor) -> Tensor:
        x = F.interpolate(rgb(to_float(images)), (_SIZE, _SIZE), mode="bilinear", antialias=True, align_corners=False)
        for stage, pool in ((1, 3), (2, 3), (3, 2)):
            x = F.max_pool2d(self._activated(F.conv2d, f"conv{stage}", x), pool, 2, ceil_mode=True)
        x = self._activated(F.conv2d, "conv4", x)
        x = self._activated(F.linear, "dense5", x.transpose(1, 3).flatten(1))  # width, height, channels
        return F.linear(x, self.weights["dense6_1.weight"], self.weights["dense6_1.bias"]).softmax(1)[:, 1]

    def _activated(self, function: object, name: str, x: Tensor) -> Tensor:
        x = function(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])  # type: ignore[operator]
        return F.prelu(x, self.weights[f"prelu{name[-1]}.weight"])
