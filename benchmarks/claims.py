"""The claims of the LS-GAN poster, from rows of (model, seed, epoch, status, metric): see `benchmarks.poster`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.experiments import Row, number

PLAIN, PENALISED = "LS-GAN", "LS-GAN-PG"
TURN, OF = 11, 24


class Curve(NamedTuple):
    """A metric of one run: its measured epochs in turn, and whether the run came to its end."""

    values: dict[int, float]
    whole: bool

    @property
    def best(self) -> float:
        return min(value for epoch, value in self.values.items() if epoch)

    @property
    def best_epoch(self) -> int:
        return min((epoch for epoch in self.values if epoch), key=self.values.__getitem__)

    def first_within(self, bound: float) -> int:
        return min(epoch for epoch, value in self.values.items() if epoch and value <= bound)

    def around(self, epoch: int) -> float:
        """The mean over the epoch and those next to it; beyond the last one, over the last three."""
        last = max(self.values)
        centre = min(epoch, last - 1)
        return statistics.mean(value for e, value in self.values.items() if abs(e - centre) <= 1 and e)


def curves(rows: Sequence[Row], metric: str) -> dict[str, dict[int, Curve]]:
    """{model: {seed: curve}}."""
    found: dict[str, dict[int, Curve]] = {PLAIN: {}, PENALISED: {}}
    for row in rows:
        if row["model"] not in found:
            continue
        of_seed = found[row["model"]]
        curve = of_seed.get(int(row["seed"]), Curve({}, True))
        if row["status"] != "trained":
            curve = curve._replace(whole=False)
        elif row[metric]:
            curve.values[int(row["epoch"])] = number(row[metric])
        of_seed[int(row["seed"])] = curve
    return found


class Claim(NamedTuple):
    text: str
    holds: bool
    numbers: str


def within(best: float) -> float:
    """The bound that is within 10 % of `best`."""
    return best + 0.1 * abs(best)


def most(held: Sequence[bool]) -> bool:
    return sum(held) > len(held) / 2


def claims(rows: Sequence[Row], metric: str, epochs: int) -> list[Claim]:
    """The claims on a metric that is lower for better samples. A run that diverged did not learn; the claims after the
    first leave its seed out."""
    found = curves(rows, metric)
    every = [curve for of_seed in found.values() for curve in of_seed.values()]
    shares = {
        model: [curve.best / curve.values[0] if curve.whole else math.inf for curve in of_seed.values()]
        for model, of_seed in found.items()
    }
    result = [
        Claim(
            "both learn",
            all(curve.whole and curve.best < 0.5 * curve.values[0] for curve in every),
            ", ".join(
                f"{model} best/initial {min(of_model):.3f} to {max(of_model):.3f}" for model, of_model in shares.items()
            ),
        )
    ]
    pairs = [(found[PLAIN][seed], found[PENALISED][seed]) for seed in found[PLAIN] if seed in found[PENALISED]]
    pairs = [pair for pair in pairs if all(curve.whole for curve in pair)]
    if not pairs:
        return result
    bounds: dict[str, Callable[[Curve, Curve], float]] = {
        "own": lambda curve, other: within(curve.best),
        "common": lambda curve, other: within(max(curve.best, other.best)),
    }
    for name, bound in bounds.items():
        reached = [
            (plain.first_within(bound(plain, penalised)), penalised.first_within(bound(penalised, plain)))
            for plain, penalised in pairs
        ]
        text = ", ".join(f"{plain} and {penalised}" for plain, penalised in reached)
        faster = most([penalised < plain for plain, penalised in reached])
        result.append(Claim(f"fewer epochs, {name}", faster, f"epochs of {PLAIN} and {PENALISED} by seed: {text}"))
    turn = max(1, round(epochs * TURN / OF))
    ends = [(c.values[0], c.around(turn), c.around(epochs)) for _, c in pairs]
    level = [at_turn - end < 0.1 * (first - at_turn) for first, at_turn, end in ends]
    worse = [at_turn < end < 1.5 * at_turn for first, at_turn, end in ends]
    text = ", ".join(f"{at_turn:.4f} then {end:.4f}" for _, at_turn, end in ends)
    best = ", ".join(str(c.best_epoch) for _, c in pairs)
    result.append(Claim("levels off", most(level), f"{PENALISED} around epoch {turn} and at the end, by seed: {text}"))
    result.append(
        Claim("declines slightly", most(worse), f"with {sum(worse)} of {len(worse)} seeds; best epochs {best}")
    )
    return result
