"""Image files to an ImageSet: found, decoded in threads, cropped and resized."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig
from gpkernels.training.data.image_set import ImageSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def decode(
    config: TrainConfig,
    name: str,
    files: Sequence[Path],
    crop: Callable[[Image.Image], Image.Image],
    progress: Callable[[int, int], None],
    labels: Sequence[int] | None = None,
    class_names: tuple[str, ...] = (),
) -> ImageSet:
    """The first `config.max_images` of the files, cropped and resized; those that cannot be read are left out."""
    files = files[: config.max_images]
    size = config.image_size or 64
    images = np.empty((len(files), 3, size, size), np.uint8)

    def read(index: int) -> str:
        """Decodes file `index` into its place; the reason if it cannot be read."""
        try:
            with Image.open(files[index]) as image:
                square = crop(image.convert("RGB")).resize((size, size), Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{files[index]}: {error}"
        images[index] = np.asarray(square).transpose(2, 0, 1)
        return ""

    skipped, good = [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, reason in enumerate(pool.map(read, range(len(files)))):
            progress(index + 1, len(files))
            if reason:
                skipped.append(reason)
            else:
                good.append(index)
    if not good:
        raise UserError(f"--data {config.data}: wanted at least one readable image, got none; first: {skipped[0]}")
    kept = None if labels is None else np.array(labels, np.int64)[good]
    return ImageSet(
        name, images if not skipped else images[good], skipped=skipped, labels=kept, class_names=class_names
    )


def centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, upper, left + side, upper + side))


def what_is(path: Path) -> str:
    return "is a file" if path.exists() else "does not exist"
