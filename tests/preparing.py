"""Folders of images and their preparation, for the tests of prepared files."""

import os
from pathlib import Path

import numpy as np
import trees

from gpkernels.training import data
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import prepared


def config(path, kind="folder", **settings):
    return TrainConfig(**{"data": f"{kind}:{path}", "image_size": 32, **settings})


def prepare(settings, progress=lambda done, total: None):
    kind, _, path = settings.data.partition(":")
    return prepared.prepare(settings, data.LISTINGS[kind](settings, Path(path)), 32, progress, 2)


def many(folder, count):
    """`count` small images, in order, as hard links of ten."""
    originals = [trees.picture(folder / f"original{index}.png", (8, 8), seed=index) for index in range(10)]
    (folder / "images").mkdir()
    for index in range(count):
        os.link(originals[index * 7 % 10], folder / "images" / f"{index:05d}.png")
    return folder / "images"


def same(one, other):
    assert np.array_equal(one.images, other.images)
    assert (one.labels is None) == (other.labels is None)
    assert one.labels is None or one.labels.tolist() == other.labels.tolist()
    assert (one.name, one.class_names, one.skipped) == (other.name, other.class_names, other.skipped)
