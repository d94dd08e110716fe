"""Rows of a JSON-lines file: one a run, appended when it ends, by any number of processes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Store:
    """A file of rows. A line that was cut short, as by a kill, counts as not written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self, **wanted: Any) -> list[Row]:
        """Those with the given entries, in the order in which they were written."""
        return [row for row in self._read() if wanted.items() <= _plain(row).items()]

    def add(self, row: Row) -> None:
        """Append a row, on a line of its own whatever stands there."""
        line = json.dumps(rounded(row), ensure_ascii=False).encode() + b"\n"
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell():
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    def _read(self) -> Iterator[Row]:
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _plain(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, (dict, list))}


def rounded(value: Any) -> Any:
    """Five digits are more than is known."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
