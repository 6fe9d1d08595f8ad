"""Any folder of images, or a zip; the sub-folders of its first level are classes where every image lies in one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpkernels.training.config import TrainConfig
from gpkernels.training.data.listing import CENTRE, Listing
from gpkernels.training.data.sources import SUFFIXES, Files, Source, Zip, check_path, fingerprint

_OPTION = "--data folder"


def listing(config: TrainConfig, path: Path) -> Listing:
    """Every image below `path`, in the order of their paths. Classes are numbered in the order of their names.

    Hidden files and folders are left out. Raises UserError where there is no image.
    """
    check_path(_OPTION, path)
    source: Source = Files(path) if path.is_dir() else Zip(path, _OPTION)
    if not source.names:
        raise source.without_images(_OPTION, SUFFIXES)
    parts = [name.split("/") for name in source.names]
    if path.is_file() and len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[1:] for part in parts]  # an archive of one folder: its sub-folders are the classes
    names = tuple(sorted({part[0] for part in parts}))
    labels = None
    if len(names) < 2 or min(map(len, parts)) < 2:
        names = ()
    else:
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([numbers[part[0]] for part in parts], np.int64)
    chosen = np.arange(len(source.names))[: config.max_images]
    return Listing(
        name=path.stem if path.is_file() else path.name,
        source=source,
        members=chosen,
        cut=CENTRE,
        stamp=fingerprint(source.stamps()),
        labels=None if labels is None else labels[chosen],
        class_names=names,
    )
