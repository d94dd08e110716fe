"""Train the autoencoder with every optimizer, with its tuned setting or all that were tried.

    python -m benchmarks.curves                                        # CPU, minutes
    python -m benchmarks.curves --settings tune --optimizers SGD --output /tmp/tune.json

Writes JSON as runs end, then a page and a plot beside it. Runs that the JSON holds already are
not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.curves.optimizers import OPTIMIZERS
from benchmarks.curves.report import write_page
from benchmarks.curves.training import Plan, train
from benchmarks.machine import ROOT, machine, versions

QUICK = {"steps": 6, "batch": 100, "warmup": 2, "train": 500, "test": 200, "part": 200}
IDENTITY = ("optimizer", "options", "seed", "plan")


def runs(args: argparse.Namespace, plan: Plan) -> list[dict[str, Any]]:
    """What identifies each run that is asked for, as its row will have it."""
    return [
        {
            "optimizer": name,
            "options": json.loads(json.dumps(options)),  # as it will be read: tuples are lists
            "seed": seed,
            "plan": asdict(plan),
        }
        for name in args.optimizers
        for options in OPTIMIZERS[name].settings(args.settings)
        for seed in args.seeds
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; 1 if time ran out before all was run."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    chosen = {"steps": args.steps, "batch": args.batch, "evaluations": args.evaluations}
    plan = Plan(**chosen | QUICK if args.quick else chosen)
    document = _document(args)
    start, missing = time.perf_counter(), 0
    for run in runs(args, plan):
        if any(all(row[key] == run[key] for key in IDENTITY) for row in document["rows"]):
            continue
        if time.perf_counter() - start > args.seconds:
            missing += 1
            continue
        row = run | _rounded(train(run["optimizer"], run["options"], run["seed"], plan))
        document["rows"].append(row)
        _write(args.output, document)
        write_page(args.output, document, asdict(plan))
        print(_shown(row), file=sys.stderr, flush=True)
    write_page(args.output, document, asdict(plan))
    if missing:
        print(f"{missing} runs are missing: --seconds {args.seconds:g}", file=sys.stderr)
    return int(missing > 0)


def _document(args: argparse.Namespace) -> dict[str, Any]:
    """What was written before, under today's circumstances."""
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    return {
        "benchmark": "curves",
        "machine": machine("cpu"),
        "versions": versions(),
        "settings": {key: str(value) for key, value in vars(args).items()},
        "rows": rows,
    }


def _write(path: Path, document: dict[str, Any]) -> None:
    """One line a row; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in document["rows"])
    partial = path.with_suffix(".partial")
    partial.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')
    partial.replace(path)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than is known."""
    curve = [[float(f"{value:.5g}") for value in point] for point in row["curve"]]
    short = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
    return short | {"curve": curve}


def _shown(row: dict[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in row["options"].items())
    last = row["curve"][-1]
    return (
        f"{row['optimizer']:16} seed {row['seed']} {row['status']:8} {row['seconds']:6.1f} s  "
        f"loss {last[2]:8.3f}  error {last[3]:7.3f}  {options}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curves", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    add("--settings", choices=("tune", "tuned"), default="tuned")
    add("--steps", type=int, default=150)
    add("--batch", type=int, default=1000)
    add("--evaluations", type=int, default=15, help="of the training loss, along the steps")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--seconds", type=float, default=float("inf"), help="no run starts later than this")
    add("--threads", type=int, default=1)
    add("--quick", action="store_true", help="a few steps on few images, to see that all works")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "curves.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
