"""When a run has met its target, how good a trial was, and the file of targets.

Targets are fixed before any other optimizer is tuned: SGD and AdamW are tuned for the lowest metric
at a horizon of three quarters of the step budget, and trained with their best settings on fresh
seeds; the target is what the better one (by its median) reaches at the end with every seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
FILE = Path(__file__).with_name("targets.json")
FAILED = 2.0
"""The score of a run that diverged or raised; those that only missed the target have less."""


def to_target(row: Row, target: float) -> tuple[float, float]:
    """Steps and seconds until the first evaluation that meets it, both infinite if none does."""
    if row["status"] == "ok":
        for steps, seconds, _, metric in row["curve"]:
            if metric <= target:
                return steps, seconds
    return float("inf"), float("inf")


def final_metric(row: Row) -> float:
    """At the horizon; infinite if the run failed."""
    return row["curve"][-1][3] if row["status"] == "ok" else float("inf")


def best_metric(row: Row) -> float:
    """The lowest along the run; infinite if there is none."""
    return min((point[3] for point in row["curve"]), default=float("inf"))


def score(row: Row, target: float, budget: int) -> float:
    """What tuning makes small: steps to the target as a share of the budget, at most 1.

    Of a run that misses it, 1 + the share of the way that is left, at most `FAILED`.
    """
    steps, _ = to_target(row, target)
    if steps <= budget:
        return steps / budget
    if row["status"] != "ok":
        return FAILED
    way = row["curve"][0][3] - target
    left = (best_metric(row) - target) / way if way > 0 else 1.0
    return 1 + min(1.0, left)


def load(size: str, workload: str, file: Path = FILE) -> dict[str, Any] | None:
    """A target and where it comes from, or None if it was not measured."""
    known = json.loads(file.read_text()) if file.exists() else {}
    return known.get(size, {}).get(workload)


def fix(
    size: str, workload: str, runs: dict[str, list[Row]], facts: dict[str, Any], file: Path = FILE
) -> dict[str, Any] | None:
    """Set a target by the runs of the baselines; None if they failed.

    Raises:
        ValueError: If there is one: targets do not move.
    """
    if load(size, workload, file):
        raise ValueError(f"{workload} ({size}) has a target: remove it from {file} by hand first")
    medians = {name: median(map(final_metric, rows)) for name, rows in runs.items() if rows}
    best = min(medians, key=medians.__getitem__, default=None)
    if best is None or max(map(final_metric, runs[best])) == float("inf"):
        return None
    entry = {
        "target": max(map(final_metric, runs[best])), "from": best, "medians": medians,
        "final": {name: sorted(map(final_metric, rows)) for name, rows in runs.items()},
        "options": runs[best][0]["options"], "horizon": runs[best][0]["horizon"], **facts,
    }  # fmt: skip
    known = json.loads(file.read_text()) if file.exists() else {}
    known.setdefault(size, {})[workload] = entry
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return entry
