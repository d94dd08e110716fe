"""From runs to the table that is printed and the JSON that is kept."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from rich.table import Table

from comparison.config import Comparison
from comparison.training import Run


@dataclass(frozen=True)
class Row:
    """One optimizer, over all its seeds.

    Attributes:
        optimizer: its name.
        accuracy_mean: mean over seeds of the best accuracy of a run.
        accuracy_std: the sample standard deviation of it; None for a single seed.
        steps_to_target: median over seeds of the steps before the first evaluation
            at the target accuracy; None if the median seed never got there.
        seconds_to_target: the same in seconds of the steps' own time.
        step_milliseconds: median over seeds of a run's median step after the timing warm-up.
        relative_step_time: median over seeds of the ratio of a run's median step
            to that of the first optimizer at the same seed.
        diverged: how many seeds ended with a training loss that is not finite.
    """

    optimizer: str
    accuracy_mean: float
    accuracy_std: float | None
    steps_to_target: float | None
    seconds_to_target: float | None
    step_milliseconds: float
    relative_step_time: float
    diverged: int


def summarize(config: Comparison, runs: Sequence[Run]) -> list[Row]:
    """Reduce the runs to one row an optimizer, in the order of the configuration."""
    by_name = {
        entry["name"]: [run for run in runs if run.optimizer == entry["name"]]
        for entry in config.optimizers
    }
    warmup = config.training.timing_warmup
    reference = [_median_step(run, warmup) for run in next(iter(by_name.values()))]
    rows = []
    for name, group in by_name.items():
        best = [max(run.accuracy) for run in group]
        reached = [_first_at(run, config.training.target_accuracy) for run in group]
        steps = [_median_step(run, warmup) for run in group]
        rows.append(
            Row(
                optimizer=name,
                accuracy_mean=mean(best),
                accuracy_std=stdev(best) if len(best) > 1 else None,
                steps_to_target=_finite(median(step for step, _ in reached)),
                seconds_to_target=_finite(median(seconds for _, seconds in reached)),
                step_milliseconds=1e3 * median(steps),
                relative_step_time=median(a / b for a, b in zip(steps, reference, strict=True)),
                diverged=sum(not math.isfinite(run.train_loss[-1]) for run in group),
            )
        )
    return rows


def _median_step(run: Run, warmup: int) -> float:
    return median(run.step_seconds[warmup:] or run.step_seconds)


def _first_at(run: Run, accuracy: float) -> tuple[float, float]:
    """Find the steps and seconds before `accuracy`; infinity if it was never reached."""
    for steps, seconds, reached in zip(run.steps, run.seconds, run.accuracy, strict=True):
        if reached >= accuracy:
            return steps, seconds
    return math.inf, math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def make_table(config: Comparison, rows: Sequence[Row]) -> Table:
    """Lay the rows out for a terminal."""
    training = config.training
    target = f"{100 * training.target_accuracy:g} %"
    seeds = f"{len(training.seeds)} seeds" if len(training.seeds) > 1 else "1 seed"
    table = Table(title=f"{config.name}: {seeds}, {training.epochs} epochs")
    table.add_column("optimizer")
    for heading in (
        f"best {config.data.evaluate_on}\naccuracy (%)",
        f"steps\nto {target}",
        f"seconds\nto {target}",
        f"time per step\n({rows[0].optimizer} = 1)",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        spread = "" if row.accuracy_std is None else f" ± {100 * row.accuracy_std:.2f}"
        table.add_row(
            row.optimizer,
            f"{100 * row.accuracy_mean:.2f}{spread}",
            "—" if row.steps_to_target is None else f"{row.steps_to_target:.0f}",
            "—" if row.seconds_to_target is None else f"{row.seconds_to_target:.2f}",
            f"{row.relative_step_time:.2f}",
        )
    lost = [f"{row.optimizer} at {row.diverged}" for row in rows if row.diverged]
    if lost:
        table.caption = f"Diverged before the end: {', '.join(lost)} of {seeds}."
    return table


def write_results(path: Path, config: Comparison, runs: Sequence[Run], rows: Sequence[Row]) -> None:
    """Write all that is needed to redraw and to judge the comparison.

    A training loss that is not finite is written as null, which JSON has a word for.
    """
    results = {
        "config": asdict(config),
        "versions": _versions(),
        "machine": _machine(),
        "rows": [asdict(row) for row in rows],
        "runs": [
            {**asdict(run), "train_loss": [_finite(loss) for loss in run.train_loss]}
            for run in runs
        ],
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def _versions() -> dict[str, str]:
    packages = ("tn_kfac", "torch", "opt_einsum", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(chain(names, [platform.processor()]))
