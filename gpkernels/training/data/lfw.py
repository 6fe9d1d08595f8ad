"""lfw-mini: the 100 faces that scikit-image carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from gpkernels.errors import UserError
from gpkernels.training.data.image_set import ImageSet

_FACES = 100
_PASSES = 32


def load(size: int) -> ImageSet:
    spec = importlib.util.find_spec("skimage")  # importing scikit-image itself takes far longer
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "--data lfw-mini: wanted scikit-image, which carries the faces, installed: pip install scikit-image"
        )
    file = Path(spec.submodule_search_locations[0]) / "data" / "lfw_subset.npy"
    if not file.is_file():
        raise UserError(f"--data lfw-mini: wanted {file}, which this scikit-image does not have")
    faces = np.load(file)[:_FACES]
    grey = [Image.fromarray(np.uint8(np.clip(face, 0, 1) * 255 + 0.5)) for face in faces]
    images = np.stack([np.asarray(face.resize((size, size), Image.Resampling.BICUBIC)) for face in grey])
    note = (
        "lfw-mini is a smoke set: 100 grey faces of Labeled Faces in the Wild, which a model memorises. "
        "It shows that training works, not how well."
    )
    return ImageSet("lfw-mini", images[:, None], note, shift=1, passes=_PASSES)
