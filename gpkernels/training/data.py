"""Image data sets, decoded once into a uint8 array: the embedded faces, any folder of images, CelebA.

`load` returns an `ImageSet`; `batch` cuts a training batch out of it. Which images, mirrored and shifted how, is a
function of (seed, step) alone, so a resumed run sees exactly the batches that an uninterrupted one would.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gpkernels.errors import UserError
from gpkernels.training.config import TrainConfig

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
CELEBA_SIZE = (178, 218)
CELEBA_BOXES = {
    "178": (0, 20, 178, 198),
    "148": (15, 35, 163, 183),
    "140": (19, 39, 159, 179),
    "128": (25, 57, 153, 185),
    "108": (35, 55, 143, 163),
}
"""Left, upper, right, lower of the crops in use for aligned CelebA; 178 is the LS-GAN-PG code's."""

_LFW_FACES = 100
_LFW_PASSES = 32


@dataclass
class ImageSet:
    """Images of shape (N, channels, size, size), uint8, and what to say about them."""

    name: str
    images: np.ndarray
    note: str = ""
    shift: int = 0  # the augmentation that suits it, in pixels
    passes: int = 1  # passes over the images that make an epoch
    skipped: list[str] = field(default_factory=list)  # files that could not be read, with the reason

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    @property
    def size(self) -> int:
        return self.images.shape[2]

    def steps_per_epoch(self, batch_size: int) -> int:
        return max(1, len(self.images) * self.passes // batch_size)

    def batch(self, config: TrainConfig, step: int, generator: torch.Generator) -> Tensor:
        """The real images of a step: shape (batch, channels, size, size), float32 in [-1, 1]."""
        epoch, index = divmod(step, self.steps_per_epoch(config.batch_size))
        chosen = self._order(config, epoch)[index * config.batch_size :][: config.batch_size]
        shift = self.shift if config.shift is None else config.shift
        images = torch.from_numpy(self.images[chosen.numpy()])
        return augment(images, flip=config.flip, shift=shift, generator=generator).float() / 127.5 - 1

    def _order(self, config: TrainConfig, epoch: int) -> Tensor:
        """Image numbers of an epoch: shuffled passes, as many as fill at least one batch."""
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        count = len(self.images)
        passes = max(self.passes, -(-config.batch_size // count))
        return torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])


def augment(images: Tensor, *, flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) mirrored with probability 1/2 and shifted by up to `shift` pixels, edges repeated."""
    batch, _, height, width = images.shape
    draws = torch.randint(-shift, shift + 1, (2, batch, 1), generator=generator)
    rows = (torch.arange(height) + draws[0]).clamp(0, height - 1)
    columns = (torch.arange(width) + draws[1]).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    picked = images[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.movedim(-1, 1).contiguous()


def load(config: TrainConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> ImageSet:
    """The data set that `config.data` names. Raises UserError, naming what is wrong."""
    kind, _, path = config.data.partition(":")
    if config.data == "lfw-mini":
        return _lfw_mini(config.image_size or 32)
    if kind == "folder" and path:
        return _folder(config, Path(path), progress)
    if kind == "celeba" and path:
        return _celeba(config, Path(path), progress)
    raise UserError(f"--data: wanted lfw-mini, folder:PATH or celeba:PATH, got {config.data!r}")


def _lfw_mini(size: int) -> ImageSet:
    spec = importlib.util.find_spec("skimage")  # importing scikit-image itself takes far longer
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "--data lfw-mini: wanted scikit-image, which carries the faces, installed: pip install scikit-image"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "lfw_subset.npy"
    if not file.is_file():
        raise UserError(f"--data lfw-mini: wanted {file}, which this scikit-image does not have")
    faces = np.load(file)[:_LFW_FACES]
    grey = [Image.fromarray(np.uint8(np.clip(face, 0, 1) * 255 + 0.5)) for face in faces]
    images = np.stack([np.asarray(face.resize((size, size), Image.Resampling.BICUBIC)) for face in grey])
    note = (
        "lfw-mini is a smoke set: 100 grey faces of Labeled Faces in the Wild, which a model memorises. "
        "It shows that training works, not how well."
    )
    return ImageSet("lfw-mini", images[:, None], note, shift=1, passes=_LFW_PASSES)


def _folder(config: TrainConfig, path: Path, progress: Callable[[int, int], None]) -> ImageSet:
    if not path.is_dir():
        raise UserError(f"--data folder: wanted a folder, got {path}, which {_what_is(path)}")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"--data folder: wanted images ({', '.join(SUFFIXES)}) in {path}, got none")
    return _decode(config, path.name, files, _centre_square, progress)


def _celeba(config: TrainConfig, path: Path, progress: Callable[[int, int], None]) -> ImageSet:
    if not path.is_dir():
        raise UserError(f"--data celeba: wanted a folder, got {path}, which {_what_is(path)}")
    roots = [root for root in (path, path / "celeba") if (root / "img_align_celeba").is_dir()]
    if not roots:
        raise UserError(f"--data celeba: wanted a folder img_align_celeba in {path} or {path / 'celeba'}, got none")
    root = roots[0]
    files = sorted((root / "img_align_celeba").glob("*.jpg"))
    if not files:
        raise UserError(f"--data celeba: wanted .jpg files in {root / 'img_align_celeba'}, got none")
    _check_attributes(root / "list_attr_celeba.txt", len(files))
    if config.split != "all":
        chosen = _partition(root / "list_eval_partition.txt", config.split)
        files = [file for file in files if file.name in chosen]
        if not files:
            raise UserError(f"--split {config.split}: wanted images of that part in {root}, got none")

    def crop(image: Image.Image) -> Image.Image:
        if config.crop == "none":
            return _centre_square(image)
        if image.size != CELEBA_SIZE:
            raise ValueError(f"wanted {CELEBA_SIZE[0]}x{CELEBA_SIZE[1]} pixels, got {image.width}x{image.height}")
        return image.crop(CELEBA_BOXES[config.crop])

    return _decode(config, "celeba", files, crop, progress)


def _check_attributes(file: Path, images: int) -> None:
    """The attribute file, where there is one, speaks of the images that are there."""
    if not file.is_file():
        return
    lines = file.read_text(errors="replace").splitlines()
    stated = lines[0].strip() if lines else ""
    rows = sum(1 for line in lines[2:] if line.strip())
    if not stated.isdigit() or int(stated) != rows or rows != images:
        raise UserError(
            f"--data celeba: wanted one count in {file.name}, its rows and img_align_celeba, "
            f"got {stated!r} stated, {rows} rows and {images} images"
        )


def _partition(file: Path, split: str) -> set[str]:
    if not file.is_file():
        raise UserError(f"--split {split}: wanted {file}, which is missing (--split all uses every image)")
    code = {"train": "0", "valid": "1", "test": "2"}[split]
    rows = (line.split() for line in file.read_text(errors="replace").splitlines())
    return {row[0] for row in rows if len(row) == 2 and row[1] == code}


def _decode(
    config: TrainConfig,
    name: str,
    files: Sequence[Path],
    crop: Callable[[Image.Image], Image.Image],
    progress: Callable[[int, int], None],
) -> ImageSet:
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
    return ImageSet(name, images if not skipped else images[good], skipped=skipped)


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, upper, left + side, upper + side))


def _what_is(path: Path) -> str:
    return "is a file" if path.exists() else "does not exist"
