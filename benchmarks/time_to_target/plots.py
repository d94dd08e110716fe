"""The metric against seconds on each workload, and the performance profile over all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.time_to_target.summary import Cells, cells, profile
from benchmarks.time_to_target.workloads import WORKLOADS

Row = dict[str, Any]
Found = dict[str, tuple[Row, list[Row]]]
# Okabe and Ito's colours, which colour-blind people can tell apart.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLES = ("-", "--", ":")
LARGEST_RATIO = 8.0


def draw(found: Found, output: Path) -> list[str]:
    """Write both figures; their file names."""
    tuned = {name: cells(rows, "final", known["target"]) for name, (known, rows) in found.items()}
    names = list(dict.fromkeys(name for of in tuned.values() for name in of))
    if not names:
        return []
    styles = {
        name: {"color": COLORS[i % 7], "ls": STYLES[i // 7 % 3]} for i, name in enumerate(names)
    }
    figures = {"profile": _profile(tuned, styles), "curves": _curves(found, tuned, styles)}
    files = {kind: output.with_name(f"{output.stem}-{kind}.png") for kind in figures}
    for kind, figure in figures.items():
        figure.savefig(files[kind], dpi=110)
    return [file.name for file in files.values()]


def _profile(tuned: dict[str, Cells], styles: dict[str, dict[str, str]]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="compressed")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(panels, ("steps", "seconds"), strict=True):
        times = {w: {n: getattr(cell, unit) for n, cell in of.items()} for w, of in tuned.items()}
        for name, ratios in profile(times).items():
            solved = [ratio for ratio in ratios if ratio <= LARGEST_RATIO]
            shares = [(i + 1) / len(ratios) for i in range(len(solved))]
            x, y = [1.0, *solved, LARGEST_RATIO], [0.0, *shares, shares[-1] if shares else 0.0]
            axes.step(x, y, where="post", label=name, **styles[name])
        axes.set(xscale="log", xlabel=f"τ: {unit} over the best optimizer's", ylim=(-0.02, 1.04))
        _tidy(axes)
    panels[0].set_ylabel("share of workloads solved within τ")
    panels[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _curves(found: Found, tuned: dict[str, Cells], styles: dict[str, dict[str, str]]) -> Figure:
    figure = Figure(figsize=(4.2 * len(found), 3.8), layout="compressed")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (workload, (known, _)) in zip(panels, found.items(), strict=True):
        for name, cell in tuned[workload].items():
            for index, row in enumerate(cell.rows):
                points = [(seconds, metric) for _, seconds, _, metric in row["curve"]]
                if points:
                    label = name if index == 0 else None
                    axes.plot(
                        *zip(*points, strict=True), lw=1, alpha=0.8, label=label, **styles[name]
                    )
        axes.axhline(known["target"], color="grey", lw=0.8)
        axes.set(xlabel="seconds", title=workload, yscale="log")
        axes.set_ylabel(WORKLOADS[workload].metric)
        _tidy(axes)
    panels[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
