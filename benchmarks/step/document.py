"""The rows of a JSON file, old and new."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.step.optimizers import OPTIMIZERS
from benchmarks.step.profiles import kernel_table
from benchmarks.step.report import MODES, page
from benchmarks.step.training import NETWORKS

Row = dict[str, Any]
TRANSIENT = ("samples", "cpu_profile")
"""What rows hold while they are compared, but files do not."""


class Document:
    """Rows by model, mode and optimizer; files are written with every change."""

    def __init__(self, path: Path, circumstances: dict[str, Any]) -> None:
        self.path = path
        self.circumstances = circumstances
        known = json.loads(path.read_text())["rows"] if path.exists() else []
        self.rows: dict[tuple[str, str, str], Row] = {_key(row): row for row in known}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Take a row in place of one of the same key, show it and write all."""
        if "cpu_profile" in row:
            name = "-".join((self.path.stem, *_key(row))).replace("/", "_").replace(" ", "_")
            self.path.with_name(f"{name}.cprofile.txt").write_text(row["cpu_profile"])
            print(f"{' '.join(_key(row))}: {row['cpu_profile']}", flush=True)
        if row.get("profile"):
            print(f"{' '.join(_key(row))}: {kernel_table(row['profile'])}\n", flush=True)
        self.rows[_key(row)] = _rounded(row)
        print(_shown(row), file=sys.stderr, flush=True)
        self.write()

    def compare(self, rows: list[Row], sgd: Row | None) -> None:
        """Note what rows are to be compared with."""
        for row in rows:
            row["sgd"] = sgd
            self.rows[_key(row)] = _rounded(row)
        self.write()

    def write(self) -> None:
        """One line a row; a reader never sees half a file."""
        ordered = sorted(self.rows.values(), key=_place)
        head = json.dumps(self.circumstances, indent=1)
        rows = ",\n  ".join(json.dumps(row) for row in ordered)
        partial = self.path.with_suffix(".partial")
        partial.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')
        partial.replace(self.path)
        document = {**self.circumstances, "rows": ordered}
        self.path.with_suffix(".md").write_text(page(document))


def _key(row: Row) -> tuple[str, str, str]:
    return row["model"], row["mode"], row["optimizer"]


def _place(row: Row) -> list[int]:
    """Where it stands among all: as in the tables of models, modes and optimizers."""
    tables = zip(_key(row), (NETWORKS, MODES, OPTIMIZERS), strict=True)
    return [list(table).index(name) if name in table else len(table) for name, table in tables]


def _rounded(value: Any) -> Any:
    """Five digits are more than is known."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items() if k not in TRANSIENT}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _shown(row: Row) -> str:
    place = f"{row['model']:13} {row['mode']:8} {row['optimizer']:22}"
    if row["status"] != "ok":
        return f"{place} {row['status']}"
    of_sgd = f" {row['seconds'] / row['sgd']['seconds']:6.3f}x" if row.get("sgd") else ""
    peak = f"  {row['bytes'] / 2**30:7.2f} GiB" if row["bytes"] else ""
    return (
        f"{place} {1e3 * row['seconds']:9.3f} ms{of_sgd}  issued in "
        f"{1e3 * row['issue_seconds']:8.3f} ms{peak}"
    )
