"""One run: an optimizer with one setting and seed, and what became of the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.curves.data import data
from benchmarks.curves.network import LOSS, autoencoder, evaluate
from benchmarks.curves.optimizers import Options, build

HOPELESS = 4.0
"""A run ends as "diverged" once its loss is this many times what it was before the first step."""


@dataclass(frozen=True)
class Plan:
    """What is the same for all optimizers."""

    steps: int
    batch: int = 1000
    warmup: int = 10
    train: int = 20_000
    test: int = 10_000
    part: int = 5000
    evaluations: int = 15

    def rate(self, step: int) -> float:
        """The learning rate at a step, of the largest: linear up, then linear down to zero."""
        up = (step + 1) / self.warmup
        return min(up, (self.steps - step) / max(1, self.steps - self.warmup + 1))

    def evaluated(self) -> set[int]:
        """Counts of steps after which the loss is evaluated, first and last among them."""
        return {round(i * self.steps / self.evaluations) for i in range(self.evaluations + 1)}


def train(name: str, options: Options, seed: int, plan: Plan) -> dict[str, Any]:
    """Train, and return the run's row.

    Its "curve" has steps, seconds, training loss and squared error, both on a fixed part of the
    training images. Seconds are those of gradients and steps; evaluations are not counted.
    """
    images, test = data(plan.train, plan.test)
    model = autoencoder(seed)
    torch.manual_seed(seed)  # labels that an optimizer draws
    optimizer = build(name, model, options)
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = _batches(images, plan.batch, seed)
    evaluated, step, seconds, curve, status = plan.evaluated(), 0, 0.0, [], "ok"
    for step in range(plan.steps + 1):
        if step in evaluated:
            loss, error = evaluate(model, images[: plan.part])
            if not math.isfinite(loss) or (curve and loss > HOPELESS * curve[0][2]):
                status = "diverged"
                break
            curve.append([step, seconds, loss, error])
        if step == plan.steps:
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * plan.rate(step)
        seconds += _timed(model, optimizer, next(batches))
    row = {"status": status, "steps": step, "seconds": seconds, "curve": curve}
    if status == "ok":
        row["test_loss"], row["test_error"] = evaluate(model, test)
    return row


def _batches(images: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Epochs without end, each in an order of its own; what is left of an epoch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        yield from (images[part] for part in order.split(size) if len(part) == size)


def _timed(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    """One step; the seconds it took (with one thread, those for which the thread ran)."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    optimizer.zero_grad()
    logits = model(batch)
    if hasattr(optimizer, "curvature"):
        optimizer.curvature(logits, LOSS, batch)  # pyright: ignore[reportAttributeAccessIssue]
    LOSS(logits, batch).backward()
    optimizer.step()
    return clock() - start
