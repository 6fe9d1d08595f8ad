"""The Inception of the FID, from weights that the user brings: a number is a FID with this network only.

The network is TensorFlow's Inception v3 of 2015-12-05 with 1008 classes (Heusel et al. 2017), which differs from the
one that torchvision trained: average pools do not count their padding, and the last block pools by maximum.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpkernels.errors import UserError
from gpkernels.metrics.features import Extractor, Layer, folded
from gpkernels.metrics.images import rgb
from gpkernels.training.disk import sha256

# A block is branches, a branch is steps in order. A step is a convolution (of stride 2 without padding where "/2"
# follows its name), a pool, or a tuple of convolutions side by side.
_STEM = (
    "Conv2d_1a_3x3/2",
    "Conv2d_2a_3x3/valid",
    "Conv2d_2b_3x3",
    "max/2",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3/valid",
    "max/2",
)
_A = (
    ("branch1x1",),
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    ("average", "branch_pool"),
)
_B = (("branch3x3/2",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3/2"), ("max/2",))
_C = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
    ("average", "branch_pool"),
)
_D = (
    ("branch3x3_1", "branch3x3_2/2"),
    ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4/2"),
    ("max/2",),
)
_E = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    ("average", "branch_pool"),
)
_E_MAX = (*_E[:3], ("max", "branch_pool"))
_BLOCKS = (
    *(("Mixed_5" + letter, _A) for letter in "bcd"),
    ("Mixed_6a", _B),
    *(("Mixed_6" + letter, _C) for letter in "bcde"),
    ("Mixed_7a", _D),
    ("Mixed_7b", _E),
    ("Mixed_7c", _E_MAX),
)
_POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max/2": lambda x: F.max_pool2d(x, 3, 2),
}
_SIZE = 299
_WANTED = (
    "a state dict of Inception v3 2015-12-05 (such as pt_inception-2015-12-05-6726825d.pth) or a TorchScript file of it"
)


class Inception(Extractor):
    """The 2048 pooled features of the user's Inception. `path` holds a state dict with torchvision's names and 1008
    classes, or a TorchScript module that takes uint8 images (N, 3, H, W), resizes them itself, and gives (N, 2048)
    (called with `return_features=True` where its forward has that argument). The file is read with
    `weights_only=True`; TorchScript runs as TorchScript. Raises UserError for anything else.
    """

    name, dimensions, batch = "inception", 2048, 8

    def __init__(self, path: Path, device: torch.device) -> None:
        self.device = device
        if not path.is_file():
            raise UserError(f"--fid-weights: wanted {_WANTED}, got {path}, which does not exist")
        self._network, resizing = _load(path, device)
        self.description = f"{path.name}, sha256 {sha256(path)}, {resizing}"
        self.notes = (f"Inception weights as given: {path.name}; published FIDs are from 10,000 to 50,000 samples",)

    def __call__(self, images: Tensor) -> Tensor:
        return self._network((rgb(images).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8))


def _load(path: Path, device: torch.device) -> tuple[Any, str]:
    try:
        if _is_script(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's, which the user's file needs
                return _Script(torch.jit.load(path, map_location=device)), "TorchScript, which resizes"
        weights = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError):
        raise UserError(f"--fid-weights: wanted {_WANTED}, got {path}, which is neither") from None
    if not isinstance(weights, dict) or any(not isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"--fid-weights: wanted {_WANTED}, got something else in {path}")
    classes = weights.get("fc.weight", torch.empty(0)).shape
    if tuple(classes) != (1008, 2048):
        raise UserError(
            f"--fid-weights: wanted 1008 classes (fc.weight of shape (1008, 2048)), as the FID's Inception has, "
            f"got {tuple(classes) or 'none'} in {path}"
        )
    try:
        return Network(weights), "299x299 by TensorFlow 1's bilinear resizing"
    except (KeyError, RuntimeError) as error:
        raise UserError(f"--fid-weights: wanted {_WANTED}, got {path}, which lacks {error}") from None


def _is_script(path: Path) -> bool:
    """A zip archive with code in it; torch.save writes zip archives without."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class _Script:
    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self.module = module.eval()
        schema: Any = module.forward  # the types do not know that a scripted method has a schema
        names = [argument.name for argument in schema.schema.arguments]
        self.options = {"return_features": True} if "return_features" in names else {}

    def __call__(self, images: Tensor) -> Tensor:
        return self.module(images, **self.options)


class Network:
    """Inception v3 as functions over a state dict, its batch norms (eps 1e-3) folded: uint8 (N, 3, H, W) to
    (N, 2048)."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.layers: dict[str, Layer] = {}
        for prefix, steps in (("", _STEM), *((f"{block}.", sum(shape, ())) for block, shape in _BLOCKS)):
            for step in steps:
                for name in step if isinstance(step, tuple) else (step,):
                    if name not in _POOLS:
                        key = prefix + name.partition("/")[0]
                        self.layers[key] = folded(weights, f"{key}.conv", f"{key}.bn", 1e-3)

    def __call__(self, images: Tensor) -> Tensor:
        x = (resize_as_tensorflow(images.float(), _SIZE) - 128) / 128
        x = self._run("", _STEM, x.contiguous(memory_format=torch.channels_last))
        for block, branches in _BLOCKS:
            x = torch.cat([self._run(f"{block}.", branch, x) for branch in branches], 1)
        return x.mean((2, 3))

    def _run(self, prefix: str, steps: tuple[Any, ...], x: Tensor) -> Tensor:
        for step in steps:
            if isinstance(step, tuple):
                x = torch.cat([self._run(prefix, (name,), x) for name in step], 1)
            elif step in _POOLS:
                x = _POOLS[step](x)
            else:
                name, _, how = step.partition("/")
                weight, bias = self.layers[prefix + name]
                padding = [0, 0] if how else [(side - 1) // 2 for side in weight.shape[2:]]
                x = F.conv2d(x, weight, bias, 2 if how == "2" else 1, padding).relu_()
        return x


def resize_as_tensorflow(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) to `size` x `size`, bilinear as TensorFlow 1 did it: output pixel i lies at i * in/out,
    with no half-pixel shift and no antialiasing."""
    rows, columns = (_weights(side, size, images) for side in images.shape[2:])
    return rows @ images @ columns.T


def _weights(inputs: int, outputs: int, like: Tensor) -> Tensor:
    position = torch.arange(outputs, device=like.device, dtype=torch.float32) * (inputs / outputs)
    low = position.long().clamp_max(inputs - 1)
    share = (position - low).to(like.dtype)
    weights = torch.zeros(outputs, inputs, dtype=like.dtype, device=like.device)
    line = torch.arange(outputs, device=like.device)
    weights[line, low] += 1 - share
    weights[line, (low + 1).clamp_max(inputs - 1)] += share
    return weights
