"""KFAC's steps of each kind: plain ones, with new factors, and with new inverses.

    python -m benchmarks.step.intervals --models resnet18 vit_b_16

A step of intervals (T, T_inverse) costs, on average, plain + (factors − plain) / T + (inverses −
factors) / T_inverse; each kind is measured apart, under bfloat16 autocast, so that no hundreds of
steps are needed. Newton-Schulz needs as many products as much of the averages is new: its inverses
are measured in every step, and after ten steps with new factors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.machine import ROOT, machine, set_precision, versions
from benchmarks.measure import is_out_of_memory, release
from benchmarks.step.optimizers import state_bytes
from benchmarks.step.training import NETWORKS, Network, Training
from tn_kfac import KFAC

Row = dict[str, Any]
VARIANTS: dict[str, dict[str, Any]] = {
    "KFAC eigh": {},
    "KFAC cholesky": {"inverse": "cholesky"},
    "KFAC newton-schulz": {"inverse": "newton-schulz"},
    "KFAC newton-schulz, max_dim=1024": {"inverse": "newton-schulz", "max_dim": 1024},
    "EKFAC": {"ekfac": True},
}
STEADY, LATER = 16, 10
"""Steps after which averages are as new as they will be; steps between later inverses."""
INTERVALS = ((10, 100), (1, 10), (1, 1))
NEVER = 10**9


def seconds(training: Training, steps: int) -> float:
    """The median of so many steps."""
    times = []
    for _ in range(steps):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        training()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) / 1e3)
    return median(times)


def sgd(network: Network) -> Row:
    """The step that all others are compared with."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    training = Training(network, "amp", build, "cuda")
    seconds(training, 8)
    torch.cuda.reset_peak_memory_stats()
    return {"optimizer": "SGD", "plain": seconds(training, 20), "peak": _peak()}


def kinds(network: Network, options: dict[str, Any]) -> Row:
    """The three kinds of step of one variant, the dearest first."""

    def build(model: nn.Module) -> KFAC:
        return KFAC(model, lr=1e-4, T=1, T_inverse=1, warn_unsupported=False, **options)

    newton = options.get("inverse") == "newton-schulz"
    training = Training(network, "amp", build, "cuda")
    seconds(training, STEADY if newton else 2)
    torch.cuda.reset_peak_memory_stats()
    row = {"inverses": seconds(training, 3), "state": state_bytes(training.optimizer)}
    if newton:
        _set(training, T_inverse=lambda step: LATER)
        seconds(training, 1)
        row["later inverses"] = median(
            max(seconds(training, 1) for _ in range(LATER)) for _ in range(3)
        )
    _set(training, T_inverse=lambda step: NEVER)
    seconds(training, 2)
    row["factors"] = seconds(training, 6)
    _set(training, T=lambda step: NEVER)
    seconds(training, 3)
    return row | {"plain": seconds(training, 10), "peak": _peak()}


def _set(training: Training, **options: Callable[[int], int]) -> None:
    for group in training.optimizer.param_groups:  # pyright: ignore[reportAttributeAccessIssue]
        group |= {key: value for key, value in options.items() if key in group}


def _peak() -> int:
    return torch.cuda.max_memory_allocated()


def average(row: Row, T: int, T_inverse: int) -> float:
    """Seconds of a step, over many."""
    plain, factors, inverses = row["plain"], row["factors"], row["inverses"]
    if T_inverse > 1:
        inverses = row.get("later inverses", inverses)
    return plain + (factors - plain) / T + (inverses - factors) / T_inverse


def table(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """All of it, as Markdown."""
    heads = [f"T={T}, T_inverse={inverse}" for T, inverse in INTERVALS]
    lines = [
        "# KFAC's step, by what it does (bfloat16 autocast)", "",
        f"{facts['machine'].get('gpu')}, torch {facts['versions']['torch']}, commit "
        f"{facts['versions']['commit']}. Relative to SGD; averages follow from the kinds.", "",
        f"| model | optimizer | plain | + factors | + inverses | {' | '.join(heads)} | memory "
        "| state, MiB |",
        f"| --- | --- | {' | '.join(['---:'] * (5 + len(heads)))} |",
    ]  # fmt: skip
    plain = {row["model"]: row for row in rows if row["optimizer"] == "SGD"}
    for row in rows:
        first = plain[row["model"]]
        when = f" (at {row['commit']})" if "commit" in row else ""
        name = f"| {row['model']} | {row['optimizer']}{when} |"
        if row is first:
            lines.append(f"{name} {row['plain'] * 1e3:.1f} ms | | {'| ' * len(heads)}| "
                         f"{row['peak'] / 2**30:.2f} GiB | |")  # fmt: skip
        elif "failed" in row:
            lines.append(f"{name} {row['failed']} | | {'| ' * len(heads)}| | |")
        else:
            base = row.get("sgd", first["plain"])
            parts = [row[kind] / base for kind in ("plain", "factors", "inverses")]
            parts += [average(row, *pair) / base for pair in INTERVALS]
            cells = " | ".join(f"{part:.2f}x" for part in parts)
            memory = f"{row['peak'] / first['peak']:.2f}x | {row['state'] / 2**20:.0f}"
            lines.append(f"{name} {cells} | {memory} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write what is known after each variant."""
    parse = argparse.ArgumentParser(prog="intervals", description=(__doc__ or "").split("\n")[0])
    add = parse.add_argument
    add("--models", nargs="+", choices=tuple(NETWORKS), default=["resnet18", "vit_b_16"])
    add("--optimizers", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    add("--batch", type=int, help="default: the model's own")
    add("--tf32", action="store_true", help="matrix products in TF32 too, not just convolutions")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "step-intervals.json")
    args = parse.parse_args(arguments)
    if not torch.cuda.is_available():
        parse.error("needs a CUDA device: on a CPU, benchmarks.step measures whole periods")
    set_precision("cuda", tf32=args.tf32)
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    facts = {"machine": machine("cuda"), "versions": versions()}
    rows: list[Row] = []
    for name in args.models:
        network = NETWORKS[name]
        network = replace(network, batch=args.batch or network.batch)
        rows.append({"model": name, **sgd(network)})
        base = rows[-1]["plain"]
        for variant in args.optimizers:
            release()
            try:
                row = kinds(network, VARIANTS[variant])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                row = {"failed": "out of memory"}
            rows.append({"model": name, "optimizer": variant, "sgd": base, **row})
            args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
            args.output.with_suffix(".md").write_text(table(rows, facts))
    print(args.output.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
