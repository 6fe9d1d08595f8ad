"""`gpkernels losses`: the table. `gpkernels losses check`: which of them are valid, or whether an f and a g are."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpkernels._text import table
from gpkernels.errors import UserError

if TYPE_CHECKING:
    from gpkernels.losses.framework import Loss
    from gpkernels.losses.validity import Validity

CHECK = """Verify numerically that a loss is valid: f'' + g'' <= 0, a y* with f(y*) = g(y*) and f'(y*) = -g'(y*) != 0,
and psi(gamma) = max_y gamma f(y) + (1 - gamma) g(y) least at gamma = 1/2 alone. Exit code 1 if a loss that was asked
for is not."""


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    losses = commands.add_parser("losses", help="list the adversarial losses; check whether f and g are valid")
    losses.set_defaults(run=_list)
    check = losses.add_subparsers(metavar="check").add_parser("check", help="verify losses", description=CHECK)
    check._negative_number_matcher = re.compile("-(?!-)")  # so that "-softplus(-y)" is a value, not an option
    check.add_argument("losses", nargs="*", metavar="LOSS", help="names of losses (default: the whole table)")
    check.add_argument("--f", metavar="EXPR", help="a formula in y for real samples, as in 'min(0, y - 1)'")
    check.add_argument("--g", metavar="EXPR", help="a formula in y for fake samples")
    check.add_argument("--epsilon", type=float, default=1.0, help="weight of f (default: 1)")
    check.add_argument("--plot", type=Path, metavar="FILE", help="draw Psi and psi into this file, as in psi.png")
    check.set_defaults(run=_check)


def _list(options: argparse.Namespace) -> int:
    from gpkernels.losses.sensitive import FAMILY
    from gpkernels.losses.table import LOSSES

    print("critic: max E_real f + E_fake g; generator: min E_fake h. With a difference, they see the score less the")
    print("other side's average, or less its partner's in the pair")
    rows = [(row.name, row.f.name, row.g.name, row.h.name, row.relation, row.doc) for row in LOSSES.values()]
    print(*table([("loss", "f", "g", "h", "difference", "what it is (source)"), *rows]), sep="\n")
    print("\nloss-sensitive: critic: min C(a), a = margin ||x - G(z)||_1 + L(x) - L(G(z)); generator: min L(G(z))")
    print(*table([("loss", "C (source)"), *FAMILY.items()]), sep="\n")
    return 0


def _check(options: argparse.Namespace) -> int:
    from gpkernels.losses.validity import examine

    try:
        losses = _asked(options)
        found = [None if loss.needs_real else examine(loss.f, loss.g, epsilon=loss.epsilon) for loss in losses]
    except ValueError as error:
        raise UserError(f"--{error}") from None
    lines = table([_HEAD, *(_row(loss.name, result) for loss, result in zip(losses, found, strict=True))])
    print(lines[0])
    for line, result in zip(lines[1:], found, strict=True):
        print(line, *(f"    {note}" for note in _notes(result)), sep="\n")
    if options.plot is not None:
        _plot(options.plot, losses)
    asked = bool(options.losses) or options.f is not None
    return 1 if asked and any(result is not None and not result.valid for result in found) else 0


def _asked(options: argparse.Namespace) -> list[Loss]:
    from gpkernels.losses.framework import compose
    from gpkernels.losses.table import LOSSES, loss

    if options.f is None and options.g is None:
        for name in options.losses:
            if name not in LOSSES:
                raise UserError(f"LOSS: wanted one of {', '.join(LOSSES)}, got {name!r}")
        rows = [LOSSES[name] for name in options.losses or LOSSES]
        return [row if row.needs_real else loss(row.name, epsilon=options.epsilon) for row in rows]
    if options.losses:
        raise UserError(f"LOSS: wanted none beside --f and --g, got {options.losses[0]!r}")
    for side, other in (("f", "g"), ("g", "f")):
        if getattr(options, side) is None:
            raise UserError(f"--{side}: wanted a formula, as --{other} has one, got none")
    return [compose(f"{options.f} | {options.g}", options.f, options.g, options.g, epsilon=options.epsilon)]


_HEAD = ("loss", "f'' + g'' <= 0", "y*", "f'(y*)", "psi least at gamma", "verdict")


def _row(name: str, found: Validity | None) -> tuple[str, ...]:
    from gpkernels.losses.validity import span

    if found is None:
        return name, "-", "-", "-", "-", "not covered"
    y_star, slope = ("none" if value is None else f"{value:.4g}" for value in (found.y_star, found.slope))
    least = span(found.least) if found.least else "none: it is infinite"
    return name, "yes" if found.concave else "no", y_star, slope, least, "valid" if found.valid else "not valid"


def _notes(found: Validity | None) -> Sequence[str]:
    if found is None:
        return ["f and g see the difference of two scores: the theorem is about one"]
    if found.valid and found.reasons:
        return [*found.reasons, "psi decides: the conditions are sufficient, not necessary"]
    if found.valid or not found.mean_valid:
        return found.reasons
    return [*found.reasons, "all the same, the critic's gain over all samples is least only where p_data = p_model"]


def _plot(path: Path, losses: Sequence[Loss]) -> None:
    """One row for all losses with the same f and g."""
    from gpkernels.losses import plot

    alike: dict[tuple[str, str], list[Loss]] = {}
    for loss in losses:
        if not loss.needs_real:
            alike.setdefault((loss.f.name, loss.g.name), []).append(loss)
    if not alike:
        raise UserError("--plot: wanted a loss whose f and g see one score, got relativistic ones only")
    plot.save(path, [(", ".join(loss.name for loss in group), group[0]) for group in alike.values()])
    print(f"Psi and psi -> {path}")
