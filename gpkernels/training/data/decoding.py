"""Bytes of an image file to pixels: bounded, cropped, resized, by many threads.

Threads and not processes: Pillow and simplejpeg decode and resize without the interpreter's lock, and threads ask
nothing of the script that calls them. simplejpeg, where it is installed, decodes JPEG; its pixels are Pillow's, bit for
bit, and what it refuses Pillow is asked for again, so that the images do not depend on it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import ModuleType

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from gpkernels.errors import UserError
from gpkernels.training.data.listing import Cut, Listing
from gpkernels.training.data.sources import CHUNK

try:
    import simplejpeg as _simplejpeg
except ImportError:
    _simplejpeg = None

simplejpeg: ModuleType | None = _simplejpeg

MAX_PIXELS = 2**26
"""Of an image before its crop: 8192 x 8192. One that claims more is skipped before it is decoded."""
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
"""What is tried, whatever the name says; Pillow knows formats besides that start other programs."""
_ORIENTATION = 0x0112

Skipped = list[tuple[int, str]]


def jobs_here() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoder() -> str:
    """What decodes, with versions."""
    return ("" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}, ") + f"Pillow {PIL.__version__}"


def nothing_readable(data: str, skipped: Skipped) -> UserError:
    return UserError(f"--data {data}: wanted at least one readable image, got none; first: {skipped[0][1]}")


def decode(content: bytes, cut: Cut, size: int) -> np.ndarray:
    """(3, size, size), uint8. Raises some Exception if `content` is no image, too large a one or of another size."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"decompression bomb: wanted at most {MAX_PIXELS} pixels, got {image.width}x{image.height}"
            )
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        rgb = None if turned else _fast(content, image)
        if rgb is None:
            rgb = ImageOps.exif_transpose(image).convert("RGB") if turned else image.convert("RGB")
    square = rgb.crop(cut.of(*rgb.size)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1)


def _fast(content: bytes, image: Image.Image) -> Image.Image | None:
    if simplejpeg is None or image.format != "JPEG" or image.mode != "RGB":
        return None
    try:
        return Image.fromarray(simplejpeg.decode_jpeg(content, "RGB"))
    except ValueError:
        return None


def decode_chunks(
    listing: Listing, size: int, todo: Iterable[int], store: Callable[[int, np.ndarray], None], jobs: int
) -> Iterator[tuple[int, Skipped]]:
    """Decodes the chunks `todo` (numbers in `listing.chunks()`) in `jobs` threads.

    `store(position, pixels)` gets images of (n, 3, size, size), uint8, for the positions from `position` on. Yields
    each chunk's number as it is finished, with the positions that could not be read (stored as black), and why.
    """
    chunks = listing.chunks()

    def run(positions: range) -> Skipped:
        skipped: Skipped = []
        buffer = np.zeros((min(CHUNK, len(positions)), 3, size, size), np.uint8)
        filled = 0
        contents = listing.source.read(listing.members[positions.start : positions.stop].tolist())
        for position, content in zip(positions, contents, strict=True):
            try:
                if isinstance(content, Exception):
                    raise content
                buffer[filled] = decode(content, listing.cut, size)
            except MemoryError:
                raise
            except Exception as error:  # Pillow's plugins raise anything for a damaged file
                buffer[filled] = 0
                reason = f"not an image ({', '.join(FORMATS)})"
                if not isinstance(error, UnidentifiedImageError):
                    reason = str(error) or type(error).__name__
                skipped.append((position, f"{listing.source.label(int(listing.members[position]))}: {reason}"))
            filled += 1
            if filled == len(buffer) or position == positions[-1]:
                store(position + 1 - filled, buffer[:filled])
                filled = 0
        return skipped

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, chunks[number]): number for number in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
