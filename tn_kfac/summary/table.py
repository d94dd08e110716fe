"""Tables of text: plain, or through rich where it is installed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST = 40
"""Letters of a cell; of longer ones the middle is left out."""


@dataclass(frozen=True)
class Table:
    """Lines of cells under a head, and notes below.

    Attributes:
        head: Names of the columns.
        lines: Cells, one for each column.
        numbers: Names of columns that are aligned to the right.
        notes: Lines of text.
    """

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    numbers: frozenset[str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [self.head, *(tuple(map(shortened, line)) for line in self.lines)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join([*(self._aligned(line, widths) for line in lines), *self.notes])

    def _aligned(self, line: Sequence[str], widths: Sequence[int]) -> str:
        cells = (
            cell.rjust(width) if name in self.numbers else cell.ljust(width)
            for name, cell, width in zip(self.head, line, widths, strict=True)
        )
        return "  ".join(cells).rstrip()

    def print(self) -> None:
        """Print through rich in a terminal or notebook, as plain text anywhere else."""
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            print(self)
            return
        console = Console(markup=False, highlight=False)
        if not (console.is_terminal or console.is_jupyter):
            print(self)
            return
        made = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), row_styles=["", "dim"])
        for name in self.head:
            right = name in self.numbers
            made.add_column(name, justify="right" if right else "left", no_wrap=right)
        for line in self.lines:
            made.add_row(*map(shortened, line))
        console.print(made)
        for note in self.notes:
            console.print(note)


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text without its middle, if it is too long."""
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[: longest - 1 - half]}…{text[-half:]}"


def skeleton(name: str) -> str:
    """A name with its numbers left out: what names of repeated layers have in common."""
    return re.sub(r"\d+", "*", name)


def merged(names: Sequence[str]) -> str:
    """One name for several with the same skeleton: layer1.[0-1].conv[1-2]."""
    numbers = (re.findall(r"\d+", name) for name in names)
    ranges = iter([_range({int(number) for number in at}) for at in zip(*numbers, strict=True)])
    return re.sub(r"\d+", lambda _: next(ranges), names[0])


def _range(numbers: Iterable[int]) -> str:
    """7, [0-11], or * for numbers with gaps."""
    ordered = sorted(numbers)
    first, last = ordered[0], ordered[-1]
    if first == last:
        return str(first)
    return f"[{first}-{last}]" if last - first == len(ordered) - 1 else "*"


def amount(number: float, unit: str = "", base: int = 1000) -> str:
    """1.23 M and the like: three digits and a prefix."""
    prefixes = ("", "k", "M", "G", "T", "P") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti")
    at = 0
    while round(number) >= base and at < len(prefixes) - 1:
        number, at = number / base, at + 1
    digits = f"{number:.3g}" if number < 1000 else f"{number:.0f}"
    return f"{digits} {prefixes[at]}{unit}".rstrip()


def percent(share: float) -> str:
    """12.3%, or <0.1% for what would be none by rounding."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"
