"""The page and the plot of a run's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.curves.network import WIDTHS

Row = dict[str, Any]
BASELINE = "SGD"
FIRST_ORDER = ("SGD", "AdamW")
"""The better of these sets the target."""
# Okabe and Ito's colours, which colour-blind people can tell apart.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
HEAD = (
    "| optimizer | runs | training loss | training error | test error | steps to target "
    "| seconds to target | ms/step | of SGD's |"
)


def by_optimizer(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each optimizer's best setting, SGD's first.

    Best is the lowest median over seeds of the loss at the end, where no run failed.
    """
    settings: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        settings.setdefault(row["optimizer"], {}).setdefault(str(row["options"]), []).append(row)
    best = {
        name: min(found.values(), key=lambda runs: median(map(final_loss, runs)))
        for name, found in settings.items()
    }
    return dict(sorted(best.items(), key=lambda item: item[0] != BASELINE))


def final_loss(row: Row) -> float:
    """On the training images; infinite if the run diverged."""
    return row["curve"][-1][2] if row["status"] == "ok" else float("inf")


def best_error(row: Row) -> float:
    """The lowest squared error on the training images along a run."""
    return min(point[3] for point in row["curve"])


def to_target(row: Row, target: float) -> tuple[float, float] | None:
    """Steps and seconds until the first evaluation at which the training error is no higher."""
    return next(((s, seconds) for s, seconds, _, error in row["curve"] if error <= target), None)


def write_page(output: Path, document: dict[str, Any], plan: dict[str, Any]) -> None:
    """The page and the plot beside the JSON file, of the runs with this plan."""
    rows = [row for row in document["rows"] if row["plan"] == plan]
    if not rows:
        return
    document, plot = document | {"rows": rows}, output.with_suffix(".png")
    draw(document, plot)
    output.with_suffix(".md").write_text(page(document, plot.name))


def page(document: dict[str, Any], plot: str) -> str:
    """The table, and under which circumstances it holds."""
    runs = by_optimizer(document["rows"])
    plan = document["rows"][0]["plan"]
    target = _target(runs)
    facts, known = document["machine"], document["versions"]
    lines = [
        "# A deep autoencoder on curves", "", _about(plan), "",
        HEAD, "| --- " + "| ---: " * (HEAD.count("|") - 2) + "|",
        *(_line(name, rows, runs, target) for name, rows in runs.items()), "",
        "Medians over seeds; in brackets the lowest and the highest. " + _aim(target), "",
        "Settings: " + "; ".join(f"{name}: {_options(rows)}" for name, rows in runs.items()) + ".",
        "", f"![loss]({plot})", "",
        f"{facts['processor']}, {facts['threads']} thread(s); "
        + ", ".join(f"{name} {v}" for name, v in known.items() if v) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _about(plan: dict[str, Any]) -> str:
    widths = "-".join(map(str, WIDTHS + WIDTHS[-2::-1]))
    return (
        f"{widths}, tanh, sparse initialisation; {plan['train']} training and {plan['test']} test "
        f"images; {plan['steps']} steps of {plan['batch']} images; the learning rate rises for "
        f"{plan['warmup']} steps, then falls linearly to zero. Loss: binary cross-entropy, summed "
        "over pixels; error: squared, summed over pixels; both averaged over examples, those of "
        f"training over {plan['part']} fixed images, the best along the run; that of the test at "
        "its end. Seconds are those of forward, backward and step. Every optimizer had the same "
        "number of settings to choose from, in runs of 150 steps (benchmarks/curves/optimizers.py)."
    )


def _target(runs: dict[str, list[Row]]) -> float | None:
    errors = [median(map(best_error, runs[name])) for name in FIRST_ORDER if name in runs]
    return min(errors, default=None)


def _aim(target: float | None) -> str:
    if target is None:
        return f"No target: neither of {' and '.join(FIRST_ORDER)} was run."
    return (
        f"Target: a training error of {target:.4g}, the best of {' and '.join(FIRST_ORDER)} "
        "(median over seeds), met at the first evaluation that is no higher."
    )


def _line(name: str, rows: list[Row], runs: dict[str, list[Row]], target: float | None) -> str:
    met = [to_target(row, target) for row in rows] if target is not None else [None]
    reached = [found for found in met if found is not None]
    tests = [row["test_error"] for row in rows if "test_error" in row]
    ms = _milliseconds(rows)
    relative = f"{ms / _milliseconds(runs[BASELINE]):.2f}" if BASELINE in runs else "-"
    count = f"{len(rows)}" if all(row["status"] == "ok" for row in rows) else (
        f"{len(rows)}, {sum(row['status'] != 'ok' for row in rows)} diverged"
    )  # fmt: skip
    cells = [
        name, count,
        _spread([min(point[2] for point in row["curve"]) for row in rows]),
        _spread([best_error(row) for row in rows]), _spread(tests),
        _reached([steps for steps, _ in reached], len(met), 0),
        _reached([seconds for _, seconds in reached], len(met), 1), f"{ms:.0f}", relative,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    shown = f"{median(values):.4g}"
    return shown if len(values) == 1 else f"{shown} [{min(values):.4g}, {max(values):.4g}]"


def _reached(values: list[float], asked: int, digits: int) -> str:
    """Of the runs that met the target, and how many did if not all."""
    if not values:
        return "never"
    shown = f"{median(values):.{digits}f}"
    return shown if len(values) == asked else f"{shown} ({len(values)} of {asked})"


def _milliseconds(rows: list[Row]) -> float:
    return median(1e3 * row["seconds"] / max(1, row["steps"]) for row in rows)


def _options(rows: list[Row]) -> str:
    return ", ".join(f"{key} {value}" for key, value in rows[0]["options"].items())


def draw(document: dict[str, Any], path: Path) -> None:
    """The training loss against steps and against seconds, a line for each run."""
    from matplotlib.figure import Figure  # only plots need it

    figure = Figure(figsize=(10, 4.4), layout="compressed")
    panels = figure.subplots(1, 2, sharey=True)
    for color, (name, rows) in zip(
        COLORS * 9, by_optimizer(document["rows"]).items(), strict=False
    ):
        for row in rows:
            for axes, column in zip(panels, (0, 1), strict=True):
                points = [(point[column], point[2]) for point in row["curve"] if point[0]]
                axes.plot(
                    *zip(*points, strict=True) if points else ([], []),
                    color=color, lw=1.5, alpha=0.8, label=name if row is rows[0] else None,
                )  # fmt: skip
    for axes, label in zip(panels, ("steps", "seconds (one CPU thread)"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("training loss: binary cross-entropy per image")
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=120)
