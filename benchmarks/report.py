"""The JSON file of a run, and its progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.convolutions import Layer
from benchmarks.operations import Operation

WRITE_EVERY_SECONDS = 20.0


class Report:
    """Collects rows, and writes them now and then, so that a killed run leaves most of them."""

    def __init__(self, path: Path, **circumstances: Any) -> None:
        self._path = path
        self._circumstances = circumstances
        self._layers: dict[tuple[str, str], dict[str, Any]] = {}
        self._rows: list[dict[str, Any]] = []
        self._missing: Counter[str] = Counter()
        self._started = self._written = time.perf_counter()
        self._planned = 0
        self.interrupted: str | None = None
        path.parent.mkdir(parents=True, exist_ok=True)

    def plan(self, todo: Sequence[tuple[Layer, Sequence[Operation]]]) -> None:
        """What is to be measured."""
        for layer, operations in todo:
            self._missing[layer.network] += len(operations)
        self._planned = self._missing.total()
        print(f"{len(todo)} layers, {self._planned} cases", file=sys.stderr)

    def add(self, layer: Layer, operation: Operation, rows: Sequence[dict[str, Any]]) -> None:
        """Take the rows of one operation on one layer."""
        self._layers[layer.network, layer.name] = layer.record()
        place = {"network": layer.network, "layer": layer.name}
        self._rows += [{**place, **_rounded(row)} for row in rows]
        self._missing[layer.network] -= 1
        done = self._planned - self._missing.total()
        shown = ", ".join(_shown(row) for row in rows)
        print(
            f"[{done}/{self._planned}, {time.perf_counter() - self._started:.0f} s] "
            f"{layer.network} {layer.name} {operation.name}: {shown}",
            file=sys.stderr,
            flush=True,
        )
        if time.perf_counter() - self._written > WRITE_EVERY_SECONDS:
            self.write()

    def left(self) -> str:
        """A sentence on what was not measured."""
        missing = ", ".join(f"{name} {n}" for name, n in self._missing.items() if n)
        if not missing:
            return "Complete."
        return f"Incomplete ({self.interrupted or 'running'}): cases missing: {missing}."

    def write(self) -> None:
        """Write all so far; a reader never sees half a file."""
        document = {
            "benchmark": "layer",
            **self._circumstances,
            "seconds": round(time.perf_counter() - self._started, 1),
            "complete": not self._missing.total(),
            "note": self.left(),
        }
        head = json.dumps(document, indent=1, allow_nan=False, default=_plain)
        lists = (("layers", self._layers.values()), ("rows", self._rows))
        tail = "".join(
            f',\n "{name}": [\n  ' + ",\n  ".join(map(json.dumps, entries)) + "\n ]"
            for name, entries in lists
        )
        partial = self._path.with_suffix(".partial")
        partial.write_text(head[: -len("\n}")] + tail + "\n}\n")
        partial.replace(self._path)
        self._written = time.perf_counter()


def _plain(value: Any) -> Any:
    """What JSON has no word for."""
    return list(value) if isinstance(value, (set, tuple)) else str(value)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Four digits are more than is known."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def _shown(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row.get('implementation', '')} {row['status']}"
    return f"{row['implementation']} {1e3 * row['seconds']:.3g} ms"
