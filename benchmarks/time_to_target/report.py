"""The page and the plots of a file of rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.time_to_target import targets
from benchmarks.time_to_target.optimizers import BASELINES
from benchmarks.time_to_target.protocol import Plan
from benchmarks.time_to_target.spaces import REFERENCE_HORIZON
from benchmarks.time_to_target.store import Store
from benchmarks.time_to_target.summary import Cell, Cells, baseline, cells, overall, speedup
from benchmarks.time_to_target.workloads import WORKLOADS

Row = dict[str, Any]
HEAD = (
    "| optimizer | reached | steps | seconds | times faster, steps | times faster, seconds "
    "| ms/step | untuned: reached | seconds | of tuned | tuned to |"
)
INTRODUCTION = f"""Steps and seconds of training until the metric on held-out data first meets a
target that was fixed beforehand (what the better of tuned SGD and AdamW reaches with every fresh
seed, at {REFERENCE_HORIZON:.0%} of the step budget). Every optimizer was tuned by Optuna with the
same number of trials, over the learning rate, weight decay, one number of its own and the horizon
of the schedule (5 % linear warm-up, then a cosine to zero); a setting that met the target was tried
on two more seeds, and its worst run counted. Numbers are medians over fresh seeds;
a run that fails, or misses the target within the step budget, took infinitely long. For a seed,
initial weights and batches are the same. Seconds are those of batches, gradients and steps, without
evaluations, and without a rehearsal of twelve steps in which kernels are compiled. "Times faster"
is against the faster of SGD and AdamW, tuned. "Untuned" is what a user begins with: the defaults,
for ours."""


def write(plan: Plan, workloads: Sequence[str]) -> None:
    """Write the page beside the rows, and plots if matplotlib is there."""
    rows = Store(plan.output).rows(size=plan.size)
    found = {}
    for name in workloads:
        known = targets.load(plan.size, name, plan.targets)
        if known:
            of = [
                row for row in rows if row["workload"] == name and row["kind"] != "reference trial"
            ]
            found[name] = (known, of)
    if not found:
        return
    plots: list[str] = []
    try:
        from benchmarks.time_to_target.plots import draw

        plots = draw(found, plan.output)
    except ModuleNotFoundError as error:
        print(f"No plots: {error}", file=sys.stderr)
    plan.output.with_suffix(".md").write_text(page(found, plan.size, plots))


def page(found: dict[str, tuple[Row, list[Row]]], size: str, plots: Sequence[str]) -> str:
    """Markdown: all workloads at a glance, then each.

    Args:
        found: By workload, its entry in the file of targets, and rows.
        size: Of the workloads.
        plots: Names of image files.
    """
    tuned = {name: cells(rows, "final", known["target"]) for name, (known, rows) in found.items()}
    lines = [f"# Time to target ({size} size)", "", INTRODUCTION, "", *_overview(tuned), ""]
    lines += [f"![{name}]({name})" for name in plots]
    for name, (known, rows) in found.items():
        lines += ["", *_workload(name, size, known, rows, tuned[name])]
    return "\n".join(lines) + "\n"


def _overview(tuned: dict[str, Cells]) -> list[str]:
    """Times faster than the better of SGD and AdamW, in seconds."""
    names = list(dict.fromkeys(name for of in tuned.values() for name in of))
    lines = [
        "Times faster, in seconds, than the better of SGD and AdamW (0: the target was missed):",
        "", f"| optimizer | {' | '.join(tuned)} | geometric mean |",
        f"| --- {'| ---: ' * (len(tuned) + 1)}|",
    ]  # fmt: skip
    for name in names:
        ratios = [speedup(of[name], baseline(of)) if name in of else None for of in tuned.values()]
        shown = [_number(ratio, 2) for ratio in [*ratios, overall(ratios)]]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def _workload(name: str, size: str, known: Row, rows: list[Row], tuned: Cells) -> list[str]:
    workload = WORKLOADS[name]
    sized, untuned = workload.sizes[size], cells(rows, "untuned", known["target"])
    medians = ", ".join(f"{key} {value:.4g}" for key, value in known["medians"].items())
    where = sorted({f"{row['device']}, torch {row['torch']}, {row['mode']}" for row in rows})
    order = list(dict.fromkeys(row["optimizer"] for row in rows))
    tried = {(row["optimizer"], row["trial"]) for row in rows if row["kind"] == "trial"}
    trials = {sum(other == key for other, _ in tried) for key in tuned}
    return [
        f"## {name}", "",
        f"{workload.metric} on {sized.held_out} held out; target {known['target']:.4g}, set by "
        f"{known['from']} (medians: {medians}). At most {sized.steps} steps of {sized.batch}; "
        f"{' or '.join(map(str, sorted(trials))) or 'no'} trials. {'; '.join(where)}.", "",
        HEAD, "| --- " + "| ---: " * (HEAD.count("|") - 3) + "| --- |",
        *(_line(key, rows, tuned, untuned) for key in order),
    ]  # fmt: skip


def _line(name: str, rows: list[Row], tuned: Cells, untuned: Cells) -> str:
    cell, plain, base = tuned.get(name), untuned.get(name), baseline(tuned)
    if cell is None and plain is None:
        status = next(row["status"] for row in reversed(rows) if row["optimizer"] == name)
        why = status if status != "ok" else "only tuned so far"
        return f"| {name} | {why} " + "| " * (HEAD.count("|") - 3) + "|"
    known = cell or plain
    assert known is not None
    by_steps = base.steps / cell.steps if base and cell else None
    cells_ = [
        *_met(cell), _number(by_steps, 2), _number(speedup(cell, base) if cell else None, 2),
        _number(known.milliseconds, 2), *_met(plain)[::2],
        _number(plain.seconds / cell.seconds if cell and plain and cell.reached else None, 2),
        _setting(cell),
    ]  # fmt: skip
    shown = f"**{name}**" if name in BASELINES else name
    return f"| {shown} | {' | '.join(cells_)} |"


def _met(cell: Cell | None) -> list[str]:
    """How many runs met the target; steps and seconds."""
    if cell is None:
        return ["-", "-", "-"]
    failed = sum(row["status"] != "ok" for row in cell.rows)
    note = f" ({failed} failed)" if failed else ""
    reached = f"{cell.reached} of {len(cell.rows)}{note}"
    return [reached, _number(cell.steps, 0), _number(cell.seconds, 2)]


def _number(value: float | None, digits: int) -> str:
    if value is None or value != value:
        return "-"
    return "∞" if value == float("inf") else f"{value:.{digits}f}"


def _setting(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    row = cell.rows[0]
    options = row["options"] or {"": "untuned"}
    shown = ", ".join(f"{k} {v:.3g}" if k else v for k, v in options.items())
    return f"{shown}, horizon {row['horizon']:.2f}"
