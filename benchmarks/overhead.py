"""What a call costs the host beside its torch calls, once its plan is cached.

    python -m benchmarks.overhead

The torch calls of an operation (those that return tensors) are recorded once, with the very
arguments they got. Overhead is the time of the operation less that of the same calls replayed in
a bare loop. Tensors are tiny, so that torch's own time, which is in both, varies little. Calls
that could be saved are no overhead here; Triton launches, which are not torch calls, are. Caches
that were missed while timing are counted: there must be none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import ROOT, machine, versions
from tn_kfac import expressions, functional

LIMIT = 30e-6
"""Seconds that a call may cost beside its torch calls."""
WINDOW = {"kernel_size": 3, "padding": 1}
KINDS = ("", "_diagonal", "_block_diagonal", "_transpose", "_gradient")
FACTORS = [f"kfac_{approx}{kind}" for approx in ("expand", "reduce") for kind in KINDS]


class Recorder(TorchFunctionMode):
    """Keeps the calls of torch functions that return tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.calls.append((func, args, kwargs or {}))
        return result

    def replay(self) -> None:
        """The same calls again."""
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def operations(device: str) -> dict[str, Callable[[], Tensor]]:
    """A call of each operation with tensors of a few dozen elements."""
    x, weight = torch.rand(1, 2, 4, 4, device=device), torch.rand(2, 2, 3, 3, device=device)
    bias, columns = torch.rand(2, device=device), torch.rand(1, 18, 16, device=device)
    calls: dict[str, Callable[[], Tensor]] = {
        "functional.conv": lambda: functional.conv(x, weight, bias, padding=1),
        "functional.conv_transpose": lambda: functional.conv_transpose(x, weight, bias, padding=1),
        "functional.unfold": lambda: functional.unfold(x, **WINDOW),
        "functional.fold": lambda: functional.fold(columns, (4, 4), **WINDOW),
    }
    for name in FACTORS:
        options = {} if name.endswith("gradient") else WINDOW
        operation = getattr(expressions, name)
        calls[name] = lambda operation=operation, options=options: operation(x, **options)
    return calls


def misses() -> int:
    """How often any cache of ours was missed, of modules and of operations."""
    modules = [module for name, module in sys.modules.items() if name.startswith("tn_kfac.")]
    found = [value for module in modules for value in vars(module).values()]
    found += [value._derive for value in found if isinstance(value, expressions.Operation)]
    caches = {id(value): value for value in found if hasattr(value, "cache_info")}
    return sum(cache.cache_info().misses for cache in caches.values())


def measure(call: Callable[[], Tensor], calls: int, repeats: int) -> dict[str, float]:
    """The least of several means over calls, and that of the same torch calls, in seconds."""
    for _ in range(calls):
        call()
    with Recorder() as recorder:
        call()
    missed = misses()
    pairs = [(_seconds(call, calls), _seconds(recorder.replay, calls)) for _ in range(repeats)]
    whole, tensors = (min(times) for times in zip(*pairs, strict=True))
    return {"call": whole, "torch_calls": len(recorder.calls), "torch": tensors,
            "overhead": whole - tensors, "misses": misses() - missed}  # fmt: skip


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """Of this thread, so that other programs on the machine disturb little."""
    start = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - start) / calls


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["# Overhead of a call whose plan is cached, in microseconds", "",
             "| operation | call | torch calls | their time | overhead | cache misses |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in rows:
        whole, tensors, rest = (1e6 * row[key] for key in ("call", "torch", "overhead"))
        lines.append(f"| {row['operation']} | {whole:.1f} | {row['torch_calls']} | {tensors:.1f} | "
                     f"{rest:.1f} | {row['misses']} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all operations; fails where one is over the limit or missed a cache."""
    parse = argparse.ArgumentParser(prog="overhead.py", description=(__doc__ or "").split("\n")[0])
    add = parse.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--calls", type=int, default=40, help="of which a repeat takes the mean")
    add("--repeats", type=int, default=150)
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "overhead.json")
    args = parse.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [{"operation": name, **measure(call, args.calls, args.repeats)}
            for name, call in operations(args.device).items()]  # fmt: skip
    settings = {key: str(value) for key, value in vars(args).items()}
    known = {"benchmark": "overhead", "machine": machine(args.device), "versions": versions(),
             "settings": settings, "rows": rows}  # fmt: skip
    args.output.write_text(json.dumps(known, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(_table(rows))
    print(_table(rows))
    return int(any(row["overhead"] > LIMIT or row["misses"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
