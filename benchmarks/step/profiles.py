"""Which kernels a step launches, and in which functions the host spends it."""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

TOP = 40
WIDTH = 160
BUSY = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
"""The events that keep a device busy."""
LAUNCHES = ("kernel", "cpu_op")

Event = Mapping[str, Any]


def kernels(step: Callable[[], None], steps: int, device: str) -> dict[str, Any]:
    """A summary of some steps, by torch's profiler; on a CPU, of operators (also inner ones)."""
    os.environ.setdefault("TEARDOWN_CUPTI", "1")  # or later launches take longer
    of = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[of]) as trace:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return summary(events, steps, BUSY[device])


def summary(events: Iterable[Event], steps: int, busy: Iterable[str]) -> dict[str, Any]:
    """Busy seconds, launches and the longest kernels (name, count, µs), all of one step."""
    kinds, launches, spans = set(busy), 0, []
    by_name: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in kinds and "dur" in event:
            start, duration = float(event["ts"]), float(event["dur"])
            spans.append((start, start + duration))
            launches += event["cat"] in LAUNCHES
            entry = by_name.setdefault(event["name"], [0, 0.0])
            entry[0] += 1
            entry[1] += duration
    longest = sorted(by_name.items(), key=lambda item: -item[1][1])[:TOP]
    return {
        "steps": steps,
        "busy_seconds": covered(spans) / steps / 1e6,
        "launches": launches / steps,
        "kernels": [[name[:WIDTH], n / steps, us / steps] for name, (n, us) in longest],
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of a union of intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def kernel_table(found: Mapping[str, Any]) -> str:
    """The summary as text."""
    lines = [
        f"{found['launches']:.1f} launches, {1e3 * found['busy_seconds']:.3f} ms busy; "
        f"of one step, mean of {found['steps']}:",
        f"{'count':>9} {'µs':>11}  name",
        *(f"{count:9.2f} {us:11.1f}  {name}" for name, count, us in found["kernels"]),
    ]
    return "\n".join(lines)


def host_functions(step: Callable[[], None], steps: int) -> str:
    """The functions that take longest, with and without those that they call.

    Backward passes run in the calling thread, or hooks would be missing.
    """
    profiler, text = cProfile.Profile(), io.StringIO()
    with torch.autograd.set_multithreading_enabled(False):
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.enable()
        for _ in range(steps):
            step()
        profiler.disable()
    text.write(f"{steps} steps\n")
    stats = pstats.Stats(profiler, stream=text)
    for order in ("cumulative", "tottime"):
        stats.sort_stats(order).print_stats(TOP)
    return text.getvalue()
