"""The picture of `gpkernels losses check --plot`: Psi(gamma, y) about y* for a few gammas, and psi(gamma)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gpkernels._extras import need
from gpkernels.errors import UserError
from gpkernels.losses.framework import Loss
from gpkernels.losses.validity import examine, psi

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def save(path: Path, rows: Sequence[tuple[str, Loss]]) -> None:
    """Draws one row for each (title, loss) into `path`, in the format that its suffix names.

    Raises UserError without matplotlib and for a suffix that it does not know.
    """
    need("--plot: drawing", "matplotlib")
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(10, 2.8 * len(rows)), layout="constrained")
    for (left, right), (title, loss) in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        y = torch.linspace(-4, 4, 401, dtype=torch.float64) + (examine(loss.f, loss.g).y_star or 0.0)
        f, g = loss.epsilon * loss.f.function(y).detach(), loss.g.function(y).detach()
        for gamma in GAMMAS:
            left.plot(y.tolist(), (gamma * f + (1 - gamma) * g).tolist(), label=f"$\\gamma$ = {gamma:g}", linewidth=1)
        left.set_title(f"$\\Psi(\\gamma, y)$: {title}", fontsize=9)
        left.set_xlabel("y")
        left.legend(fontsize=7)
        share = torch.linspace(0, 1, 201, dtype=torch.float64)
        value = psi(loss.f, loss.g, share, epsilon=loss.epsilon)
        right.plot(share.tolist(), torch.where(value.isinf(), torch.nan, value).tolist(), marker=".", markersize=3)
        right.axvline(0.5, color="grey", linewidth=0.5)
        right.set_title("$\\psi(\\gamma)$" + (", infinite elsewhere" if value.isinf().any() else ""), fontsize=9)
        right.set_xlabel("$\\gamma$")
        right.set_xlim(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=100)
    except ValueError as error:
        raise UserError(f"--plot: {error}") from None
