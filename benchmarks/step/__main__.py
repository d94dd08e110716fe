"""Whole training steps with every optimizer, against SGD's.

    python -m benchmarks.step --quick --device cpu                     # half a minute
    python -m benchmarks.step --models resnet18 --modes amp --max-seconds 540
    python -m benchmarks.step --report                                 # page and plot anew

Writes JSON and a page as rows come, then a plot beside them. Rows that are measured again replace
those of the same model, mode and optimizer in the JSON; others are kept.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import PACKAGES, ROOT, machine, versions
from benchmarks.step.document import Document
from benchmarks.step.measuring import Plan, Row, baseline, cell, fastest
from benchmarks.step.optimizers import OPTIMIZERS, SGD
from benchmarks.step.report import MODES, draw, page
from benchmarks.step.training import NETWORKS, Network

OTHERS = tuple(name for name in OPTIMIZERS if name not in SGD)
DEFAULTS = {
    "models": [name for name in NETWORKS if name != "tiny"],
    "modes": list(MODES), "steps": 30, "warmup": 10, "average": 100,
}  # fmt: skip
QUICK = {"models": ["tiny"], "modes": ["fp32", "amp"], "steps": 5, "warmup": 2, "average": 1}


def session(
    args: argparse.Namespace, place: dict[str, Any], document: Document, deadline: float
) -> int:
    """All optimizers on one model in one mode, SGD first and last; how many found no time."""
    network, mode = sized(args, place["model"]), place["mode"]
    place = place | {"device": args.device, "batch": network.batch, "pixels": network.pixels}
    plan = Plan(args.device, args.steps, args.warmup, args.average, args.profile, args.cpu_profile)
    started = time.perf_counter()
    rows: list[Row] = []
    for name in SGD:
        row = cell(network, mode, OPTIMIZERS[name], plan)
        rows.append(place | {"optimizer": name} | row)
        document.add(rows[-1])
    best = fastest(rows)
    known = baseline(best["optimizer"], best, None) if best else None
    document.compare(rows, known)
    again = (time.perf_counter() - started) / len(SGD)  # what SGD takes once more
    left = [name for name in args.optimizers if name != "SGD"]
    while left and time.perf_counter() + again < deadline:
        name = left.pop(0)
        row = cell(network, mode, OPTIMIZERS[name], plan)
        rows.append(place | {"optimizer": name, "sgd": known} | row)
        document.add(rows[-1])
    if best:
        plain = replace(plan, profile=False, cpu_profile=False)
        after = cell(network, mode, OPTIMIZERS[best["optimizer"]], plain)
        document.compare(rows, baseline(best["optimizer"], best, after))
    return len(left)


def sized(args: argparse.Namespace, model: str) -> Network:
    """A network with the batch and image size that are asked for."""
    network = NETWORKS[model]
    return replace(network, batch=args.batch or network.batch, pixels=args.pixels or network.pixels)


def run(args: argparse.Namespace) -> int:
    """Measure all that is asked for; 1 if something found no time."""
    deadline = time.perf_counter() + (args.max_seconds or float("inf"))
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    document = Document(args.output, circumstances(args))
    document.write()
    commit = {"commit": document.circumstances["versions"]["commit"]}
    places = [{"model": m, "mode": mode} | commit for m in args.models for mode in args.modes]
    missing, count = 0, len([name for name in args.optimizers if name != "SGD"])
    stop = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for place in places:
            late = time.perf_counter() > deadline
            missing += count + 1 if late else session(args, place, document, deadline)
    except KeyboardInterrupt:
        missing += 1
    finally:
        signal.signal(signal.SIGTERM, stop)
    report(args)
    if missing:
        print("Incomplete: interrupted, or out of --max-seconds", file=sys.stderr)
    return int(missing > 0)


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """What the rows depend on."""
    return {
        "benchmark": "step",
        "machine": machine(args.device),
        "versions": versions((*PACKAGES, "singd")),
        "settings": {key: str(value) for key, value in vars(args).items()},
    }


def report(args: argparse.Namespace) -> None:
    """The page and the plot of what the JSON holds."""
    document = json.loads(args.output.read_text())
    plot = args.output.with_suffix(".png")
    if not args.no_plots:
        try:
            draw(document, plot)
        except ModuleNotFoundError as error:
            print(f"No plot: {error}", file=sys.stderr)
    name = plot.name if plot.exists() else None
    args.output.with_suffix(".md").write_text(page(document, name))
    print(f"Written to {args.output.with_suffix('.md')}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    args = _parser().parse_args(arguments)
    for name, value in (DEFAULTS | (QUICK if args.quick else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.report:
        report(args)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.step: error: --device cuda: torch sees no GPU", file=sys.stderr)
        return 2
    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    names = ("SGD", *OTHERS)
    add("--models", nargs="+", choices=NETWORKS, metavar="NAME", help=", ".join(NETWORKS))
    add("--modes", nargs="+", choices=MODES)
    add("--optimizers", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"SGD is always measured; {', '.join(OTHERS)}")  # fmt: skip
    add("--steps", type=int, help="that are timed")
    add("--warmup", type=int, help="least steps before that")
    add("--average", type=int, help="least steps of optimizers that do not do the same in each")
    add("--batch", type=int, help="default: the model's")
    add("--pixels", type=int, help="of an image's side; default: the model's")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--tf32", action="store_true", help="float32 matrix products in TF32 (torch: off)")
    add("--profile", action="store_true", help="kernels and their launches, by torch.profiler")
    add("--cpu-profile", action="store_true", help="the host's functions, by cProfile")
    add("--max-seconds", type=float, help="no optimizer starts when too few are left")
    add("--quick", action="store_true", help="a tiny model, few steps: to see that all works")
    add("--report", action="store_true", help="only the page and the plot, from the JSON")
    add("--no-plots", action="store_true")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "step.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
