"""The picture of a comparison: accuracy and loss, against steps and seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from comparison.config import Comparison
from comparison.training import Run

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def draw_curves(path: Path, config: Comparison, runs: Sequence[Run]) -> None:
    """Draw the mean over seeds as a line, and lowest to highest seed as a band.

    All runs are evaluated at the same steps, so seeds are averaged there; their
    seconds at a step differ slightly and are averaged too.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for index, entry in enumerate(config.optimizers):
        group = [run for run in runs if run.optimizer == entry["name"]]
        color, name = COLORS[index % len(COLORS)], entry["name"]
        for column, x in enumerate((lambda run: run.steps, lambda run: run.seconds)):
            _line(axes[0, column], group, x, lambda run: run.accuracy, color, name)
            _line(axes[1, column], group, x, lambda run: run.train_loss, color, name)
    _label(axes, config)
    figure.savefig(path, dpi=150)


def _line(
    axis: Axes,
    group: Sequence[Run],
    x: Callable[[Run], list],
    y: Callable[[Run], list],
    color: str,
    name: str,
) -> None:
    across = np.mean([x(run) for run in group], axis=0)
    values = np.array([y(run) for run in group])
    axis.plot(across, values.mean(0), lw=1.8, color=color, label=name)
    axis.fill_between(across, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)


def _label(axes: np.ndarray, config: Comparison) -> None:
    training = config.training
    accuracy, loss = axes[:, 0]
    accuracy.set_ylabel(f"{config.data.evaluate_on} accuracy")
    accuracy.set_ylim(0.8, 1.002)
    accuracy.yaxis.set_major_locator(MultipleLocator(0.05))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    loss.set_ylabel("training loss")
    loss.set_yscale("log")
    for axis, label in zip(axes[1], ("step", "seconds, evaluation left out"), strict=True):
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
    for axis in axes[0]:
        axis.axhline(training.target_accuracy, color="0.4", lw=1, ls=":", zorder=0)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(loc="lower right", frameon=False)
    axes[0, 0].figure.suptitle(
        f"{config.name}: mean and range over {len(training.seeds)} seeds "
        f"(dotted: {100 * training.target_accuracy:g} %)"
    )
