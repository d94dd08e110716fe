"""From rows to what is compared: medians to the target, ratios, performance profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.results import geometric_mean
from benchmarks.time_to_target.optimizers import BASELINES
from benchmarks.time_to_target.targets import best_metric, to_target

Row = dict[str, Any]
INFINITE = float("inf")


@dataclass(frozen=True)
class Cell:
    """An optimizer on a workload: its runs on fresh seeds, tuned or untuned."""

    rows: Sequence[Row]
    target: float

    @property
    def reached(self) -> int:
        """Runs that met the target."""
        return sum(steps < INFINITE for steps, _ in self._met())

    @property
    def steps(self) -> float:
        """To the target, median over seeds; runs that missed it took infinitely many."""
        return median([steps for steps, _ in self._met()])

    @property
    def seconds(self) -> float:
        """As `steps`."""
        return median([seconds for _, seconds in self._met()])

    @property
    def milliseconds(self) -> float:
        """Of a step, median over seeds."""
        return median([1e3 * row["seconds"] / max(1, row["steps"]) for row in self.rows])

    @property
    def metric(self) -> float:
        """The lowest along a run, median over seeds."""
        return median(map(best_metric, self.rows))

    def _met(self) -> list[tuple[float, float]]:
        return [to_target(row, self.target) for row in self.rows]


Cells = dict[str, Cell]
"""By optimizer."""


def cells(rows: Sequence[Row], kind: str, target: float) -> Cells:
    """The optimizers that have runs of a kind, of one workload."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == kind and not row["status"].startswith("absent"):
            found.setdefault(row["optimizer"], []).append(row)
    return {name: Cell(of, target) for name, of in found.items()}


def baseline(tuned: Cells) -> Cell | None:
    """The faster of SGD and AdamW, if either meets the target."""
    known = [tuned[name] for name in BASELINES if name in tuned]
    met = [cell for cell in known if cell.seconds < INFINITE]
    return min(met, key=lambda cell: cell.seconds, default=None)


def speedup(cell: Cell, of: Cell | None) -> float | None:
    """The baseline's seconds over an optimizer's; 0 if it misses the target."""
    return None if of is None else of.seconds / cell.seconds


def overall(speedups: Sequence[float | None]) -> float | None:
    """The geometric mean; None if a workload is missing, or was not solved."""
    known = [value for value in speedups if value]
    return geometric_mean(known) if known and len(known) == len(speedups) else None


def profile(times: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Each optimizer's time over the best one's, on every workload, least first.

    The performance profile (Dolan and Moré, 2002) at τ is the share of these that are at most τ.

    Args:
        times: By workload, then by optimizer; infinite where the target was missed.
    """
    names = {name: None for of in times.values() for name in of}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for of in times.values():
        best = min(of.values(), default=INFINITE)
        for name in names:
            time = of.get(name, INFINITE)
            ratios[name].append(time / best if math.isfinite(time) else INFINITE)
    return {name: sorted(values) for name, values in ratios.items()}
