"""Curves of runs of scripts/train.py, from the CSV files that they log.

    python -m benchmarks.logged ResNet18: SGD=runs/a/csv/version_0/metrics.csv SINGD=…

A word with a colon after it begins a row of pictures. Writes a picture, the numbers in it as JSON,
and a page with the last validation of each run.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

Curves = dict[str, list[list[float]]]
SHOWN = {"train/loss": "training loss", "val/top1": "validation error"}
SMOOTH = 5
"""Logged training losses that are averaged for a point."""


def read(path: Path) -> Curves:
    """[step, value] of what is shown, as it was logged.

    Raises:
        ValueError: If the file does not log all of it.
    """
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        curves = {
            name: [[float(row["step"]), float(row[name])] for row in rows if row.get(name)]
            for name in SHOWN
        }
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no metrics.csv of a run: {error}") from None
    for name, points in curves.items():
        if not points:
            raise ValueError(f"{path} logs no {name}: give the metrics.csv of a run that has some")
    return curves


def panels(given: Sequence[str]) -> dict[str, dict[str, Curves]]:
    """Runs by panel and name, of words TITLE: and NAME=FILE.

    Raises:
        ValueError: If a word is neither, a run stands before the first title, or a title alone.
    """
    found: dict[str, dict[str, Curves]] = {}
    for word in given:
        name, is_run, path = word.partition("=")
        if not is_run and not name.endswith(":"):
            raise ValueError(f"{word!r} is neither a title, as in 'ResNet18:', nor NAME=FILE")
        if not is_run:
            found[name.removesuffix(":")] = {}
        elif not found:
            raise ValueError(f"{word!r} stands before the first title, as in 'ResNet18:'")
        else:
            list(found.values())[-1][name] = read(Path(path))
    for title, runs in found.items():
        if not runs:
            raise ValueError(f"no run follows {title!r}: give NAME=FILE")
    return found


def smooth(points: Sequence[Sequence[float]], count: int) -> list[list[float]]:
    """Means of so many neighbours."""
    groups = [points[at : at + count] for at in range(0, len(points), count)]
    return [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]


def draw(found: dict[str, dict[str, Curves]], path: Path) -> None:
    """A row of pictures for each panel."""
    from matplotlib.figure import Figure

    from benchmarks.plots import COLORS

    figure = Figure(figsize=(9, 3.2 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), len(SHOWN), squeeze=False)
    for row, (title, runs) in zip(axes, found.items(), strict=True):
        for axis, (key, label) in zip(row, SHOWN.items(), strict=True):
            for color, (name, curves) in zip(COLORS, runs.items(), strict=False):
                points = smooth(curves[key], SMOOTH if key == "train/loss" else 1)
                ys = [1 - y if key == "val/top1" else y for _, y in points]
                axis.plot([x for x, _ in points], ys, color=color, label=name)
            axis.set(yscale="log", xlabel="step", ylabel=label, title=title)
            axis.grid(True, which="both", alpha=0.3)
        row[0].legend()
    figure.savefig(path, dpi=110)


def markdown(found: dict[str, dict[str, Curves]], picture: str) -> str:
    """The page."""
    lines = ["# Runs of scripts/train.py", "", f"![curves]({picture})", ""]
    lines += ["| network | run | steps | best validation accuracy | last | last training loss |",
              "| --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for title, runs in found.items():
        for name, curves in runs.items():
            accuracies = [y for _, y in curves["val/top1"]]
            losses = curves["train/loss"]
            last = losses[-SMOOTH:]
            lines.append(
                f"| {title} | {name} | {losses[-1][0] + 1:.0f} | {max(accuracies):.2%} | "
                f"{accuracies[-1]:.2%} | {sum(y for _, y in last) / len(last):.3f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the three files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="TITLE: NAME=FILE …, as often as there are panels")
    default = ROOT / "benchmarks" / "results" / "glyphs.json"
    parser.add_argument("--output", type=Path, default=default)
    given: Any = parser.parse_args(arguments)
    if given.output.suffix != ".json" or not given.output.parent.is_dir():
        parser.error(f"--output {given.output} must be a .json file in a folder that exists")
    try:
        found = panels(given.runs)
    except (OSError, ValueError) as error:
        print(f"benchmarks.logged: {error}", file=sys.stderr)
        return 2
    given.output.write_text(json.dumps(found) + "\n")
    picture = given.output.with_suffix(".png")
    draw(found, picture)
    given.output.with_suffix(".md").write_text(markdown(found, picture.name))
    print(given.output.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
