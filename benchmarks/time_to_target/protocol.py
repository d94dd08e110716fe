"""The order of runs: targets, then tuning, then fresh seeds; what is on file is not run again.

1. "reference": SGD and AdamW are tuned for the lowest metric at `REFERENCE_HORIZON` of the budget
   and trained on fresh seeds; what the better one always reaches becomes the target (`targets`).
2. "tune": every optimizer has the same number of trials, the first with its untuned options, to
   meet the target in as few steps as possible. A setting that meets it once is tried on two more
   seeds and counts by the worst, so that no lucky run wins. Steps, not seconds: so several
   optimizers can be tuned at once on one device.
3. "final": the best setting, and the untuned one, on fresh seeds, one run at a time. The baseline
   that set the target keeps the setting that did, if no trial met it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, versions
from benchmarks.time_to_target import targets
from benchmarks.time_to_target.optimizers import BASELINES, find
from benchmarks.time_to_target.spaces import REFERENCE_HORIZON
from benchmarks.time_to_target.store import Row, Store
from benchmarks.time_to_target.training import attempt, rehearse
from benchmarks.time_to_target.tuning import suggest
from benchmarks.time_to_target.workloads import WORKLOADS, Task

TUNING_SEED, REFERENCE_SEED, FINAL_SEED = 0, 1000, 2000
TUNING_SEEDS = 3
Score = Callable[[Row], float]


@dataclass(frozen=True)
class Plan:
    """What is asked for; the same in each process."""

    size: str
    device: str
    mode: str
    trials: int
    seeds: int
    output: Path
    data: Path
    targets: Path
    deadline: float
    """On the clock `time.time`, which processes share."""


@lru_cache(maxsize=1)
def _task(name: str, plan: Plan) -> Task:
    return Task(name, plan.size, plan.device, plan.mode, plan.data)


@lru_cache(maxsize=1)
def _facts(device: str) -> dict[str, Any]:
    """Of where a run was."""
    known, found = machine(device), versions()
    where = known.get("gpu", known["processor"])
    return {"device": where, "torch": found["torch"], "commit": found["commit"]}


class Session:
    """The runs of one optimizer on one workload."""

    def __init__(self, workload: str, name: str, plan: Plan) -> None:
        self.plan, self.name, self.entry = plan, name, find(name)
        self.store, self.late = Store(plan.output), False
        self.place = {
            "workload": workload, "size": plan.size, "mode": plan.mode, "optimizer": name
        }  # fmt: skip
        self._rehearsed = False

    @property
    def budget(self) -> int:
        """Steps at most."""
        return WORKLOADS[self.place["workload"]].sizes[self.plan.size].steps

    def scores(self, target: float) -> Score:
        """What runs are compared by."""
        return lambda row: targets.score(row, target, self.budget)

    def rows(self, kind: str) -> list[Row]:
        """Of runs that took place, whether or not they failed."""
        found = self.store.rows(**self.place, kind=kind)
        return [row for row in found if not row["status"].startswith("absent")]

    def trials(self, kind: str) -> dict[int, list[Row]]:
        """The runs of each setting that was tried."""
        found: dict[int, list[Row]] = {}
        for row in self.rows(kind):
            found.setdefault(row["trial"], []).append(row)
        return found

    def tune(
        self, kind: str, score: Score, horizon: float | None, target: float | None, seeds: int
    ) -> None:
        """Complete the trials; none if the optimizer is absent.

        A setting that meets the target is run on up to `seeds` seeds, until it misses it.
        """
        for number in range(self.plan.trials):
            known = self.trials(kind)
            rows = known.pop(number, [])
            params, options, until = None, self.entry.untuned, REFERENCE_HORIZON
            if number:
                told = [(of[0]["params"], max(map(score, of))) for n, of in known.items() if n]
                params = rows[0]["params"] if rows else (
                    suggest(self.entry.space, told, number, horizon)
                )  # fmt: skip
                options, until = self.entry.space.options(params), params["horizon"]
            more = {"kind": kind, "trial": number, "params": params}
            for seed in range(TUNING_SEED + len(rows), TUNING_SEED + seeds):
                if rows and score(rows[-1]) > 1:
                    break
                row = self._run(more, options, seed, until, target)
                if row is None or row["status"].startswith("absent"):
                    return
                rows.append(row)

    def best(self, kind: str, score: Score) -> Row | None:
        """A run of the setting whose worst score is the least; the fewest seconds among equals."""
        settings = self.trials(kind).values()

        def key(rows: list[Row]) -> tuple[float, float]:
            return max(map(score, rows)), max(row["seconds"] for row in rows)

        return min(settings, key=key)[0] if settings else None

    def repeat(
        self, kind: str, options: dict[str, Any], horizon: float, first: int, target: float | None
    ) -> list[Row]:
        """Complete the runs of one setting on fresh seeds."""
        for seed in range(first, first + self.plan.seeds):
            if any(row["seed"] == seed for row in self.rows(kind)):
                continue
            row = self._run({"kind": kind}, options, seed, horizon, target)
            if row is None or row["status"].startswith("absent"):
                break
        return [row for row in self.rows(kind) if first <= row["seed"] < first + self.plan.seeds]

    def _run(
        self, more: Row, options: dict[str, Any], seed: int, horizon: float, target: float | None
    ) -> Row | None:
        """One row, or None if there is no time left for it."""
        walls = [row["wall"] for row in self.store.rows(**self.place)]
        if time.time() + max(walls, default=0.0) > self.plan.deadline:
            self.late = True
            return None
        task, start = _task(self.place["workload"], self.plan), time.perf_counter()
        if not self._rehearsed:
            self._rehearse(task)
        result = attempt(task, self.name, options, seed, horizon, target)
        wall = time.perf_counter() - start
        identity = {"seed": seed, "horizon": horizon, "options": options, "fixed": self.entry.fixed}
        facts = _facts(self.plan.device) | {"data": task.digest}
        row = self.place | more | identity | {"target": target, "wall": wall} | result | facts
        self.store.add(row)
        print(shown(row), file=sys.stderr, flush=True)
        return row

    def _rehearse(self, task: Task) -> None:
        """Untimed; what fails here fails again where it is noted."""
        self._rehearsed = True
        try:
            rehearse(task, self.name, self.entry.untuned)
        except Exception as error:
            print(f"{self.name}: rehearsal: {error}".partition("\n")[0], file=sys.stderr)


def shown(row: Row) -> str:
    """One line about a row."""
    metric = f"{targets.best_metric(row):.4g}" if row["curve"] else "-"
    options = " ".join(f"{key}={value:.3g}" for key, value in row["options"].items())
    run = f"trial {row['trial']}" if "trial" in row else f"seed {row['seed']}"
    return (
        f"{row['workload']:9}{row['kind']:16}{row['optimizer']:24}{run:10}{row['status']:9}"
        f"{row['steps']:6} steps {row['seconds']:7.1f} s  best {metric:8} "
        f"horizon={row['horizon']:.2f} {options}"
    )


def reference(workload: str, name: str, plan: Plan) -> bool:
    """A baseline's part in setting the target; whether time ran out."""
    session = Session(workload, name, plan)
    session.tune("reference trial", targets.final_metric, REFERENCE_HORIZON, None, 1)
    best = session.best("reference trial", targets.final_metric)
    if best is not None and not session.late:
        options = best["options"]
        session.repeat("reference", options, REFERENCE_HORIZON, REFERENCE_SEED, None)
    return session.late


def fix_target(workload: str, plan: Plan) -> float | None:
    """The target on file, or the one that the baselines' runs make, once all have ended."""
    known = targets.load(plan.size, workload, plan.targets)
    if known is None:
        runs = {name: Session(workload, name, plan).rows("reference") for name in BASELINES}
        if any(len(rows) < plan.seeds for rows in runs.values()):
            return None
        facts = {key: runs[BASELINES[0]][0][key] for key in ("device", "torch", "data", "mode")}
        known = targets.fix(plan.size, workload, runs, facts, plan.targets)
    return known["target"] if known else None


def tune(workload: str, name: str, plan: Plan) -> bool:
    """An optimizer's trials; whether time ran out."""
    session = Session(workload, name, plan)
    target = fix_target(workload, plan)
    if target is None:
        return True
    session.tune("trial", session.scores(target), None, target, TUNING_SEEDS)
    return session.late


def final(workload: str, name: str, plan: Plan) -> bool:
    """An optimizer's best setting and its untuned one on fresh seeds; whether time ran out."""
    session = Session(workload, name, plan)
    target = fix_target(workload, plan)
    if target is None:
        return True
    score = session.scores(target)
    best, tried = session.best("trial", score), session.trials("trial")
    if best is not None and len(tried) >= plan.trials:
        setter = targets.load(plan.size, workload, plan.targets) or {}
        met = any(max(map(score, rows)) <= 1 for rows in tried.values())
        chosen = setter if not met and setter["from"] == name else best
        session.repeat("final", chosen["options"], chosen["horizon"], FINAL_SEED, target)
    session.repeat("untuned", session.entry.untuned, REFERENCE_HORIZON, FINAL_SEED, target)
    return session.late


PHASES = {"reference": reference, "tune": tune, "final": final}


def job(phase: str, workload: str, name: str, plan: Plan, threads: int) -> bool:
    """An optimizer's part in a phase, in whatever process; whether it is not complete."""
    torch.set_num_threads(threads)
    if plan.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if plan.mode == "amp" else "highest")
    return PHASES[phase](workload, name, plan)


def jobs(
    phase: str, workloads: list[str], optimizers: list[str], plan: Plan
) -> Iterator[tuple[str, str]]:
    """Workloads and optimizers that a phase is about."""
    for workload in workloads:
        if phase == "reference":
            known = targets.load(plan.size, workload, plan.targets)
            yield from ((workload, name) for name in BASELINES if not known)
        else:
            yield from ((workload, name) for name in optimizers)
