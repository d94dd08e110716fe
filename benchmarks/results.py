"""Reading a run's JSON: rows by case, and ratios between implementations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ORDER = ("ours", "unfold", "einconv", "torch")


@dataclass(frozen=True)
class Case:
    """An operation on one layer, with the row of each implementation that was tried."""

    network: str
    layer: str
    operation: str
    rows: dict[str, Row]

    def value(self, implementation: str, key: str = "seconds") -> float | None:
        """A number of an implementation, or None if it has none."""
        return self.rows.get(implementation, {}).get(key)

    def ratio(self, other: str) -> float | None:
        """Our time over another's; "limit" is the byte limit."""
        ours = self.value("ours")
        theirs = self.value("ours", "limit_seconds") if other == "limit" else self.value(other)
        return ours / theirs if ours and theirs else None

    def busy(self, implementation: str) -> float | None:
        """The time of calls in a row: of the host or the GPU, whichever takes longer."""
        seconds = self.value(implementation)
        return max(seconds, self.value(implementation, "host_seconds") or 0.0) if seconds else None

    @property
    def name(self) -> str:
        """Network and layer."""
        return self.layer if self.network == "peers" else f"{self.network} {self.layer}"


@dataclass(frozen=True)
class Results:
    """A run: its circumstances, and its cases in the order in which they were measured."""

    document: dict[str, Any]
    cases: tuple[Case, ...]

    @property
    def operations(self) -> list[str]:
        """Those that were measured."""
        asked = self.document["settings"]["operations"]
        return [name for name in asked if any(case.operation == name for case in self.cases)]

    @property
    def networks(self) -> list[str]:
        """The networks that were measured, and "peers" only if there is nothing else."""
        found = list(dict.fromkeys(case.network for case in self.cases))
        return [name for name in found if name != "peers"] or found

    def of(self, operation: str, networks: Sequence[str] | None = None) -> list[Case]:
        """The cases of an operation; of the given networks, or of `networks`."""
        wanted = self.networks if networks is None else networks
        return [c for c in self.cases if c.operation == operation and c.network in wanted]

    def implementations(self, operation: str) -> list[str]:
        """Those with at least one time."""
        cases = [case for case in self.cases if case.operation == operation]
        return [name for name in ORDER if any(case.value(name) for case in cases)]


def load(path: Path) -> Results:
    """Read a file that `benchmarks.layer` wrote."""
    document = json.loads(path.read_text())
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in document["rows"]:
        key = (row["network"], row["layer"], row["operation"])
        cases.setdefault(key, {})[row.get("implementation", "")] = row
    return Results(document, tuple(Case(*key, rows) for key, rows in cases.items()))


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def ratios(cases: Iterable[Case], other: str) -> list[tuple[float, Case]]:
    """Our time over another's, worst first, of the cases where both have one."""
    found = [(ratio, case) for case in cases if (ratio := case.ratio(other)) is not None]
    return sorted(found, key=lambda pair: -pair[0])
