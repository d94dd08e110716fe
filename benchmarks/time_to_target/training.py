"""One run: an optimizer with one setting and seed, until it meets the target or its horizon."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.measure import is_out_of_memory, release
from benchmarks.time_to_target.optimizers import Options, build, find
from benchmarks.time_to_target.workloads import Batch, Task

Row = dict[str, Any]
WARMUP = 0.05
"""Share of the horizon in which the learning rate rises."""
HOPELESS = 3.0
"""A run has diverged once the loss is this many times what it was before the first step."""
REHEARSED = 12
"""Steps of another network before the clock runs: kernels are compiled and chosen, plans cached."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of the largest: linear up, then a cosine down to zero."""

    steps: int

    def __call__(self, step: int) -> float:
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup))) / 2


class Training:
    """A network and its optimizer in the middle of a run."""

    def __init__(self, task: Task, name: str, options: Options, seed: int, steps: int) -> None:
        self.task, self.schedule, self.step = task, Schedule(steps), 0
        self.model = task.model(seed)
        entry, average = find(name), task.workload.loss_average
        self.optimizer = build(entry, self.model, entry.fixed | options, average)
        torch.manual_seed(seed)  # labels that an optimizer draws
        self.batches: Iterator[Batch] = task.batches(seed)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        fisher = (entry.fixed | options).get("fisher", "empirical")
        self.draws = fisher in ("mc", "type-2")

    def advance(self, steps: int) -> float:
        """Take so many steps; the seconds they took."""
        start = _now(self.task.device)
        for _ in range(steps):
            self._one()
        return _now(self.task.device) - start

    def _one(self) -> None:
        share = self.schedule(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        x, y = next(self.batches)
        self.optimizer.zero_grad()
        outputs = self.task.outputs(self.model, x).float()
        if self.draws:
            self.optimizer.curvature(outputs, self.task.loss, y)  # pyright: ignore
        self.task.loss(outputs, y).backward()
        self.optimizer.step()
        self.step += 1


def _now(device: str) -> float:
    """Once all work is done. With one CPU thread, the time for which that thread ran."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.thread_time() if torch.get_num_threads() == 1 and device == "cpu" else (
        time.perf_counter()
    )  # fmt: skip


def marks(budget: int, steps: int, evaluations: int) -> list[int]:
    """Steps at which the network is evaluated: evenly over the budget, and at the horizon."""
    even = (round(i * budget / evaluations) for i in range(evaluations + 1))
    return sorted({step for step in even if step < steps} | {steps})


def train(
    task: Task, name: str, options: Options, seed: int, horizon: float, target: float | None
) -> Row:
    """Train until the metric is at most `target`, or to the horizon if that is None.

    The row's "curve" has steps, seconds, and loss and metric on the data held out. Seconds are
    those of batches, gradients and steps; evaluations are not counted.
    """
    steps = max(1, round(horizon * task.size.steps))
    training = Training(task, name, options, seed, steps)
    seconds, curve, status = 0.0, [], "ok"
    for mark in marks(task.size.steps, steps, task.size.evaluations):
        seconds += training.advance(mark - training.step)
        loss, metric = task.evaluate(training.model)
        if not math.isfinite(loss) or (curve and loss > HOPELESS * curve[0][2]):
            status = "diverged"
            break
        curve.append([mark, seconds, loss, metric])
        if target is not None and metric <= target:
            break
    return {"status": status, "steps": training.step, "seconds": seconds, "curve": curve}


def rehearse(task: Task, name: str, options: Options) -> None:
    """Take a few steps that are not counted."""
    Training(task, name, options, 0, 1000).advance(REHEARSED)
    task.evaluate(task.model(0))


def attempt(
    task: Task, name: str, options: Options, seed: int, horizon: float, target: float | None
) -> Row:
    """As `train`; what fails is a row that says why."""
    try:
        row = train(task, name, options, seed, horizon, target)
    except ModuleNotFoundError as error:
        row = _nothing(f"absent: {error.name}")
    except Exception as error:
        first = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        row = _nothing(f"failed: {first}".partition("\n")[0])
    release()
    return row


def _nothing(status: str) -> Row:
    return {"status": status, "steps": 0, "seconds": 0.0, "curve": []}


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters())
