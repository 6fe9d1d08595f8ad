"""Fashion-MNIST (Xiao et al. 2017): 60,000 and 10,000 grey images of 28x28 in ten classes, as idx files.

Debian's package dataset-fashion-mnist holds them; MNIST's own files have the same names and layout. Images become
32x32 by two black pixels on each side, and larger ones are made of those.
"""

from __future__ import annotations

import dataclasses
import gzip
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig
from gpkernels.training.data.image_set import ImageSet

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SIDE, _PADDING = 28, 2


def load(config: TrainConfig, path: Path | None) -> ImageSet:
    """The training part; the test part, where its files are, is held out. path=None searches the usual folders."""
    if path is None:
        places = [Path(prefix) / "share/datasets/fashion-mnist" for prefix in (sys.prefix, "/usr")]
    else:
        places = [path]
    for folder in places:
        if _find(folder, "train-images-idx3-ubyte") is not None:
            return _part(config, folder, "train")
    raise UserError(
        f"--data fashion-mnist: wanted train-images-idx3-ubyte, or that with .gz, in {' or '.join(map(str, places))}, "
        "got none (Debian's package dataset-fashion-mnist holds it; fashion-mnist:PATH names another folder)"
    )


def _part(config: TrainConfig, folder: Path, part: str) -> ImageSet:
    images = read_idx(_need(folder, f"{part}-images-idx3-ubyte"), 3)
    file = _need(folder, f"{part}-labels-idx1-ubyte")
    labels = read_idx(file, 1)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise UserError(f"--data fashion-mnist: wanted images of 28x28 in {folder}, got {images.shape[1:]}")
    if len(images) != len(labels):
        raise UserError(f"--data fashion-mnist: wanted a label an image, got {len(images)} and {len(labels)} in {file}")
    if not len(images):
        raise UserError(f"--data fashion-mnist: wanted images, got none in {folder}")
    if labels.max() >= len(CLASSES):
        raise UserError(f"--data fashion-mnist: wanted labels below {len(CLASSES)} in {file}, got {labels.max()}")
    images, labels = images[: config.max_images], labels[: config.max_images]
    found = ImageSet(
        "fashion-mnist", _resized(images, config.image_size or 32), labels=labels.astype(np.int64), class_names=CLASSES
    )
    if part == "train" and _find(folder, "t10k-images-idx3-ubyte") is not None:
        found.load_held_out = lambda: _part(dataclasses.replace(config, max_images=None), folder, "t10k")
    return found


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """(N, 28, 28) to (N, 1, size, size)."""
    padded = np.pad(images, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING)))
    if size != padded.shape[1]:
        pictures = (Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in padded)
        padded = np.stack([np.asarray(picture) for picture in pictures])
    return padded[:, None]


def _find(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _need(folder: Path, name: str) -> Path:
    file = _find(folder, name)
    if file is None:
        raise UserError(f"--data fashion-mnist: wanted {folder / name}, or that with .gz, which is missing")
    return file


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of so many dimensions in an idx file, gzipped where its name ends in .gz.

    The header is 0, 0, 8 for unsigned bytes, the number of dimensions, and each as a big-endian 32-bit number.
    Raises UserError, naming the file, for another header, and for more or fewer bytes than it promises.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--data fashion-mnist: {file} is damaged ({error})") from None
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        raise UserError(f"--data fashion-mnist: wanted {file} to begin with {magic.hex()}, got {content[:4].hex()!r}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    size = int(np.prod(shape, dtype=object))
    if len(content) != header + size:
        raise UserError(f"--data fashion-mnist: wanted {header + size} bytes for {shape} in {file}, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
