"""Pictures of a run: sample grids and training curves."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gpkernels.pixels import to_uint8
from gpkernels.training.disk import write_atomically


def save_grid(path: Path, images: Tensor, columns: int | None = None) -> None:
    """The grid of `images` as a PNG."""
    content = png(grid(images, columns))
    write_atomically(path, lambda file: file.write(content))


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images of shape (N, C, H, W) in [-1, 1], C 1 or 3, row by row, small images enlarged by whole pixels."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, 96 // height)
    pixels = to_uint8(images.cpu())
    cells = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    cells[:count] = pixels
    cells = cells.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    array = cells.reshape(rows * height, columns * width, channels).squeeze(-1).numpy()
    return Image.fromarray(array).resize((columns * width * scale, rows * height * scale), Image.Resampling.NEAREST)


PANELS = (
    ("losses", ("critic_loss", "generator_loss")),
    ("the critic's output", ("score_real", "score_fake")),
    ("penalty and the critic's gradient norm", ("penalty", "grad_norm", "grad_norm_max")),
    ("how far the critic tells real from fake", ("gap", "margin", "classification_error")),
    ("gradient of all weights, norm", ("critic_weight_grad", "generator_weight_grad")),
)


def save_curves(path: Path, records: list[dict[str, Any]]) -> None:
    """The curves of a log as a PNG."""
    content = curves(records)
    write_atomically(path, lambda file: file.write(content))


def curves(records: list[dict[str, Any]]) -> bytes:
    """What a log holds of the numbers of PANELS, over the steps, as a PNG; other numbers in a panel of their own."""
    import matplotlib.figure

    known = {name for _, names in PANELS for name in names} | {"step", "epoch"}
    other = dict.fromkeys(name for record in records for name in record if name not in known)
    panels = [(title, names) for title, names in (*PANELS, ("others", tuple(other))) if _any(records, names)]
    rows = -(-len(panels) // 2) or 1
    figure = matplotlib.figure.Figure(figsize=(11, 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).flat
    for axes, (title, names) in zip(grid, panels, strict=False):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _any(records: list[dict[str, Any]], names: Sequence[str]) -> bool:
    return any(name in record for record in records for name in names)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()
