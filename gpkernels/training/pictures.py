"""Pictures of a run: sample grids and training curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gpkernels.training.checkpoint import write_atomically


def save_grid(path: Path, images: Tensor, columns: int | None = None) -> None:
    """The grid of `images` as a PNG."""
    picture = grid(images, columns)
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Images of shape (N, C, H, W) in [-1, 1], C 1 or 3, row by row, small images enlarged by whole pixels."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, 96 // height)
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    cells = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    cells[:count] = pixels
    cells = cells.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    array = cells.reshape(rows * height, columns * width, channels).squeeze(-1).numpy()
    return Image.fromarray(array).resize((columns * width * scale, rows * height * scale), Image.Resampling.NEAREST)


def save_curves(path: Path, records: list[dict[str, Any]]) -> None:
    """What a log holds of losses, scores, penalty and gradient norm, gap, margin and classification error, over the
    steps, as a PNG."""
    import matplotlib.figure

    panels = (
        ("losses", ("critic_loss", "generator_loss")),
        ("the critic's output", ("score_real", "score_fake")),
        ("penalty and gradient norm", ("penalty", "grad_norm")),
        ("how far the critic tells real from fake", ("gap", "margin", "classification_error")),
    )
    figure = matplotlib.figure.Figure(figsize=(11, 7), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
