"""Time, memory and the host's work of a training's steps.

On a GPU, steps follow each other as in a training loop, with an event between each two. An
optimizer that does the same in every step has their median; others have the mean over whole
periods. Before that come warm-up steps (compilation, cuDNN's search, first factors), whose memory
does not count. What the host needs to issue a step is taken apart, always with an empty queue.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median, quantiles
from typing import Any

import torch

from benchmarks.measure import is_out_of_memory, release
from benchmarks.step.optimizers import Entry, state_bytes
from benchmarks.step.profiles import host_functions, kernels
from benchmarks.step.training import Network, Training

Row = dict[str, Any]
Step = Callable[[], None]
ISSUES = 10


@dataclass(frozen=True)
class Plan:
    """How all optimizers are measured."""

    device: str
    steps: int = 30
    warmup: int = 10
    average: int = 100
    """Steps of optimizers that do not do the same in each."""
    profile: bool = False
    cpu_profile: bool = False


def cell(network: Network, mode: str, entry: Entry, plan: Plan) -> Row:
    """One optimizer on one model; what goes wrong is the row's status."""
    torch._dynamo.reset()  # or the limit of recompilations ends in eager mode
    release()
    if mode == "graph" and (plan.device != "cuda" or entry.period != 1):
        return {"status": "absent: a graph replays one step, on a GPU"}
    try:
        left = torch.cuda.memory_allocated() if plan.device == "cuda" else None
        training = Training(network, mode, entry.build, plan.device)
        return {"status": "ok", "left_bytes": left, **measure(training, entry, plan)}
    except ModuleNotFoundError as error:
        return {"status": f"absent: {error.name}"}
    except Exception as error:
        if is_out_of_memory(error):
            return {"status": "failed: out of memory"}
        traceback.print_exc(file=sys.stderr)
        said = str(error).strip().partition("\n")[0][:200]
        return {"status": f"failed: {type(error).__name__}: {said}"}


def measure(training: Training, entry: Entry, plan: Plan) -> Row:
    """All numbers; "samples" are the seconds of single steps."""
    for _ in range(training.eager + entry.warmup(plan.warmup)):
        training()
    steady = entry.period == 1
    count = plan.steps if steady else entry.whole(max(plan.steps, plan.average))
    _synchronize(plan.device)
    if plan.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    samples = timed(training, count, plan.device)
    peak = torch.cuda.max_memory_allocated() if plan.device == "cuda" else None
    peak = training.peak or peak
    issues = issued(training, entry.whole(ISSUES), plan.device)
    low, _, high = quantiles(samples, n=4, method="inclusive")
    row = {
        "steps": count,
        "statistic": "median" if steady else "mean",
        "seconds": median(samples) if steady else mean(samples),
        "low": low,
        "high": high,
        "issue_seconds": median(issues) if steady else mean(issues),
        "bytes": peak,
        "state_bytes": state_bytes(training.optimizer),
        "samples": samples,
    }
    if plan.profile:
        row["profile"] = kernels(training, entry.whole(3), plan.device)
    if plan.cpu_profile:
        row["cpu_profile"] = host_functions(training, max(5, entry.T))
    return row


def timed(step: Step, count: int, device: str) -> list[float]:
    """The seconds of steps in a row."""
    if device != "cuda":
        moments = [time.perf_counter()]
        for _ in range(count):
            step()
            moments.append(time.perf_counter())
        return [end - start for start, end in pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def issued(step: Step, count: int, device: str) -> list[float]:
    """The seconds until a step returns, whether or not its work is done."""
    times = []
    for _ in range(count):
        _synchronize(device)
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    _synchronize(device)
    return times


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def baseline(name: str, before: Row, after: Row | None) -> Row:
    """What ratios refer to: the median of SGD's steps before and after the others'."""
    kept = ("issue_seconds", "bytes", "state_bytes")
    found = {"kind": name, "before_seconds": before["seconds"], **{k: before[k] for k in kept}}
    if before.get("profile"):
        found |= {key: before["profile"][key] for key in ("busy_seconds", "launches")}
    if not after or after["status"] != "ok":
        return found | {"seconds": before["seconds"], "after_seconds": None, "drift": None}
    pooled = {
        "seconds": median([*before["samples"], *after["samples"]]),
        "issue_seconds": mean([before["issue_seconds"], after["issue_seconds"]]),
        "after_seconds": after["seconds"],
        "drift": after["seconds"] / before["seconds"] - 1,
    }
    return found | pooled


def fastest(rows: Sequence[Row]) -> Row | None:
    """Of those that were measured."""
    good = [row for row in rows if row["status"] == "ok"]
    return min(good, key=lambda row: row["seconds"], default=None)
