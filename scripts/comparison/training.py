"""Train, and measure each step alone.

The loop is plain torch on the CPU. A framework such as Lightning would add
more time to a step than so small a network takes, and hide the optimizers'
differences. What a step's time holds: the batch, forward, backward, the
optimizer and the schedule. What it does not: evaluation and progress display.

Optimizers take turns, an epoch each, so that whatever else slows the machine
down for a while slows all of them down.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import mean
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from comparison.config import Comparison, OptimizerEntry, Training
from comparison.digits import Digits, make_network


@dataclass
class Run:
    """What was measured of one optimizer at one seed.

    `step_seconds` has an item a step, the other lists one an evaluation.
    `seconds` adds up the steps' own time so far; `train_loss` is the mean over
    the batches since the evaluation before.
    """

    optimizer: str
    seed: int
    step_seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def optimizer_class(entry: OptimizerEntry) -> Callable[..., Optimizer]:
    """Look up the class of `entry`.

    Raises:
        ValueError: if there is no such optimizer.
    """
    package, _, name = entry["class"].rpartition(".")
    where = f"optimizers: {entry['name']!r}: class {entry['class']!r}"
    if package not in ("torch.optim", "tn_kfac"):
        raise ValueError(f"{where} is not torch.optim.NAME or tn_kfac.NAME")
    cls = getattr(importlib.import_module(package), name, None)
    if not (inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer):
        raise ValueError(f"{where} does not exist")
    return cls


def make_optimizer(entry: OptimizerEntry, network: nn.Module) -> Optimizer:
    """Build the optimizer that `entry` describes for all of the network.

    Raises:
        ValueError: for an unknown class, or arguments that the class refuses.
    """
    cls = optimizer_class(entry)
    subject = network if entry["class"].startswith("tn_kfac.") else network.parameters()
    try:
        return cls(subject, **entry["args"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optimizers: {entry['name']!r}: {entry['class']} refuses its args: {error}"
        ) from None


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to 1, then a cosine to 0 at `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def steps_per_epoch(config: Training, data: Digits) -> int:
    """Count the full batches of the training set.

    Raises:
        ValueError: if there is none.
    """
    images = len(data.train_labels)
    if config.batch_size > images:
        raise ValueError(
            f"training.batch_size: {config.batch_size} is more than the {images} training images"
        )
    return images // config.batch_size


class Trainee:
    """One network with its optimizer, and what is measured of them."""

    def __init__(self, entry: OptimizerEntry, config: Comparison, data: Digits, seed: int) -> None:
        """Initialise the network and the batch order from `seed` alone."""
        training = config.training
        total = training.epochs * steps_per_epoch(training, data)
        torch.manual_seed(seed)
        self.network = make_network(config.network)
        self.order = torch.Generator().manual_seed(seed)
        self.optimizer = make_optimizer(entry, self.network)
        self.schedule = LambdaLR(
            self.optimizer,
            lambda step: learning_rate_factor(step, training.warmup_steps, total),
        )
        self.config, self.data, self.total_steps = training, data, total
        self.run = Run(entry["name"], seed)
        self._losses: list[float] = []

    def train_epoch(self) -> None:
        """Step through the training set once, evaluating when it is due."""
        size, times = self.config.batch_size, self.run.step_seconds
        batches = torch.randperm(len(self.data.train_labels), generator=self.order).split(size)
        for batch in batches[: steps_per_epoch(self.config, self.data)]:
            start = perf_counter()
            self._losses.append(self.step(batch))
            times.append(perf_counter() - start)
            if len(times) % self.config.eval_every == 0 or len(times) == self.total_steps:
                self._evaluate()

    def step(self, batch: Tensor) -> float:
        """Take one step with the images of these indices; return their loss."""
        images, labels = self.data.train_images[batch], self.data.train_labels[batch]
        self.optimizer.zero_grad()
        loss = cross_entropy(self.network(images), labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.network.eval()
        hits = self.network(self.data.eval_images).argmax(1) == self.data.eval_labels
        self.network.train()
        self.run.steps.append(len(self.run.step_seconds))
        self.run.seconds.append(sum(self.run.step_seconds))
        self.run.train_loss.append(mean(self._losses))
        self.run.accuracy.append(hits.double().mean().item())
        self._losses.clear()


def try_optimizers(config: Comparison, data: Digits) -> None:
    """Let every optimizer take one step with a network that is then thrown away.

    So a bad entry is found before any training, and what happens only once in
    a process (torch's own start, tn_kfac's planning) falls on no timed step.

    Raises:
        ValueError: names the entry and what went wrong.
    """
    batch = torch.arange(config.training.batch_size)
    for entry in config.optimizers:
        optimizer_class(entry)  # outside `try`: an error within the library is no bad entry
        try:
            Trainee(entry, config, data, seed=0).step(batch)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"optimizers: {entry['name']!r}: {entry['class']} cannot take a step: {error}"
            ) from error


def train_all(
    config: Comparison, data: Digits, on_epoch: Callable[[str, int], None]
) -> Iterator[Run]:
    """Train every optimizer at every seed; `on_epoch(name, seed)` is called after each epoch."""
    for seed in config.training.seeds:
        trainees = [Trainee(entry, config, data, seed) for entry in config.optimizers]
        for epoch in range(config.training.epochs):
            first = epoch % len(trainees)
            for trainee in trainees[first:] + trainees[:first]:
                trainee.train_epoch()
                on_epoch(trainee.run.optimizer, seed)
        yield from (trainee.run for trainee in trainees)
