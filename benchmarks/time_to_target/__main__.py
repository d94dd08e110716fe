r"""Tune every optimizer alike, then time it to a target that was fixed beforehand.

    python -m benchmarks.time_to_target --prepare                     # the data, once: seconds
    python -m benchmarks.time_to_target --small --workloads digits    # CPU, minutes
    python -m benchmarks.time_to_target --device cuda --size short --workloads gpt \
        --processes 6 --max-seconds 540
    python -m benchmarks.time_to_target --size short --report         # page and plots anew

Runs are appended to a file of JSON lines as they end, and not run again: repeat a command until it
returns 0. Then a page and plots are written beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.machine import ROOT
from benchmarks.time_to_target import data, protocol, targets
from benchmarks.time_to_target.optimizers import OPTIMIZERS, find
from benchmarks.time_to_target.protocol import PHASES, Plan
from benchmarks.time_to_target.report import write
from benchmarks.time_to_target.workloads import SIZES, WORKLOADS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; 1 if time ran out before all was run."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        for name in args.optimizers:
            find(name)
    except ValueError as error:
        parser.error(str(error))
    if args.prepare:
        data.prepare(args.data)
        print(f"Written to {args.data}", file=sys.stderr)
        return 0
    plan = _plan(args)
    if args.device == "cuda" and not torch.cuda.is_available() and not args.report:
        parser.error("--device cuda: torch sees no GPU")
    missing = 0 if args.report else run(args, plan)
    write(plan, args.workloads)
    if missing:
        print(f"Incomplete: {missing} jobs found no time or no target", file=sys.stderr)
    return int(missing > 0)


def run(args: argparse.Namespace, plan: Plan) -> int:
    """All phases in their order; how many jobs are not complete."""
    missing = 0
    for phase in args.phases:
        asked = list(protocol.jobs(phase, args.workloads, args.optimizers, plan))
        if phase == "final" or args.processes == 1:
            late = [protocol.job(phase, *job, plan, args.threads) for job in asked]
        else:
            late = _together(phase, asked, plan, args)
        missing += sum(late)
        for workload in args.workloads if phase == "reference" else ():
            protocol.fix_target(workload, plan)
    return missing


def _together(
    phase: str, asked: list[tuple[str, str]], plan: Plan, args: argparse.Namespace
) -> list[bool]:
    """Jobs in processes of their own, each with a workload and an optimizer."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context) as pool:
        futures = [pool.submit(protocol.job, phase, *job, plan, args.threads) for job in asked]
        return [future.result() for future in futures]


def _plan(args: argparse.Namespace) -> Plan:
    size = args.size or ("full" if args.device == "cuda" else "small")
    mode = args.mode or ("amp" if args.device == "cuda" else "fp32")
    output = args.output or ROOT / "benchmarks" / "results" / f"time-to-target-{size}.jsonl"
    deadline = time.time() + args.max_seconds
    return Plan(
        size, args.device, mode, args.trials, args.seeds, output, args.data, args.targets, deadline
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_target", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
        help=", ".join(WORKLOADS))  # fmt: skip
    add("--optimizers", nargs="+", default=list(OPTIMIZERS), metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}; NAME:key=value,... has other options")  # fmt: skip
    add("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    add("--size", choices=SIZES, help="default: full on cuda, small on cpu")
    add("--small", action="store_const", const="small", dest="size")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--mode", choices=("fp32", "amp"), help="default: amp (bfloat16) on cuda, fp32 on cpu")
    add("--trials", type=int, default=16, help="settings tried, for each optimizer")
    add("--seeds", type=int, default=5, help="fresh ones of final runs")
    add("--processes", type=int, default=1, help="optimizers that are tuned at once")
    add("--threads", type=int, default=1, help="of torch on the CPU, in each process")
    add(
        "--max-seconds", type=float, default=float("inf"), help="no run starts that would end later"
    )
    add("--prepare", action="store_true", help="only make the data")
    add("--report", action="store_true", help="only the page and plots, from the rows")
    add("--data", type=Path, default=data.FILE)
    add("--targets", type=Path, default=targets.FILE)
    add("--output", type=Path, help="default: benchmarks/results/time-to-target-SIZE.jsonl")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
