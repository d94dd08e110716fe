"""The measurement of one operation on one layer: a row for each implementation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementations import Case
from benchmarks.measure import (
    LONG_SECONDS,
    Device,
    Run,
    host_seconds,
    is_out_of_memory,
    largest_error,
    release,
    sample,
    spread,
)
from benchmarks.operations import Operation, prepare, reference

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: the most samples of one implementation.
        seconds: the most time for them.
        bytes_per_second: of a copy, the unit of the byte limit.
        memory_bytes: what is known to need more than so many is skipped.
        errors: whether to compare with a float64 reference.
        implementations: the names of those to measure.
    """

    repeats: int
    seconds: float
    bytes_per_second: float
    memory_bytes: float
    errors: bool
    implementations: tuple[str, ...]


class Skipped(Exception):
    """An implementation is known not to fit."""


def measure(device: Device, operation: Operation, case: Case, settings: Settings) -> list[Row]:
    """Time, memory and error of every implementation of an operation on one layer.

    What fails says so in its row's status; only "ok" rows have numbers.
    """
    exact = _reference(operation, case) if settings.errors else None
    rows: list[Row] = []
    runs: dict[str, tuple[Run, float]] = {}
    for name in operation.implementations():
        if name not in settings.implementations:
            continue
        row: Row = {"operation": operation.name, "implementation": name, "status": "ok"}
        rows.append(row)
        try:
            runs[name] = _first_calls(device, operation, case, settings, exact, row)
        except Exception as error:  # whatever it is, the others shall be measured
            row["status"] = _status(error)
            release()
    del exact
    times = _times(device, runs, settings, rows)
    for row in rows:
        if row["status"] == "ok":
            seconds = times[row["implementation"]]
            low, high = spread(seconds)
            row |= {"seconds": median(seconds), "low": low, "high": high, "repeats": len(seconds)}
    return rows


def _times(
    device: Device, runs: dict[str, tuple[Run, float]], settings: Settings, rows: list[Row]
) -> dict[str, list[float]]:
    """Samples of all; should they not fit at the same time, of each alone."""
    try:
        return sample(device, runs, settings.repeats, settings.seconds)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    times: dict[str, list[float]] = {}
    for row in rows:
        name = row["implementation"]
        if row["status"] == "ok":
            release()
            try:
                times |= sample(device, {name: runs.pop(name)}, settings.repeats, settings.seconds)
            except RuntimeError as error:
                row["status"] = _status(error)
    return times


def _first_calls(
    device: Device,
    operation: Operation,
    case: Case,
    settings: Settings,
    exact: Tensor | None,
    row: Row,
) -> tuple[Run, float]:
    """Everything but the samples; returns what to time and the host's share of it."""
    start = time.perf_counter()
    prepared = prepare(operation, row["implementation"], case)
    device.synchronize()
    if row["implementation"] == "einconv":
        row["build_seconds"] = time.perf_counter() - start
    if (needs := prepared.needs()) > min(settings.memory_bytes, device.free_bytes()):
        raise Skipped(f"skipped: would need {needs / 2**30:.1f} GiB")
    start = time.perf_counter()
    result = prepared.run()
    device.synchronize()
    row["first_seconds"] = time.perf_counter() - start
    row["limit_seconds"] = operation.least_bytes(case, result) / settings.bytes_per_second
    if exact is not None:
        row["max_relative_error"] = _error(result, exact)
    del result
    row["extra_bytes"] = device.extra_bytes(
        lambda: prepare(operation, row["implementation"], case).run()
    )
    if not case.x.is_cuda:
        return prepared.run, 0.0
    calls = 3 if row["first_seconds"] < LONG_SECONDS else 1
    row["host_seconds"] = host_seconds(device, prepared.run, calls)
    return prepared.run, row["host_seconds"]


def _reference(operation: Operation, case: Case) -> Tensor | None:
    """The exact result, or None if it does not fit."""
    try:
        return reference(operation, case)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        release()
        return None


def _error(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape:
        raise ValueError(f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    error = largest_error(result, exact)
    if not math.isfinite(error):
        raise ValueError("the result is not finite")
    return error


def _status(error: Exception) -> str:
    if isinstance(error, Skipped):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory"
    if isinstance(error, torch.AcceleratorError):
        raise error  # the device is lost for the others too
    said = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {said[0]}"[:200]
