"""A diagram in coordinates: boxes, lines, dots and labels, in inches, y upwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

Point = tuple[float, float]

LETTER = 0.085
"""Width of a letter of an axis label."""
LABEL = 0.2
"""Height of an axis label with its distance from the line."""


@dataclass(frozen=True)
class Box:
    """A node, by its centre; its text may be turned, to be read from below."""

    text: str
    kind: str
    x: float
    y: float
    width: float
    height: float
    turned: bool = False

    @property
    def top(self) -> float:
        """Its upper edge."""
        return self.y + self.height / 2

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y - self.height / 2


@dataclass(frozen=True)
class Label:
    """An axis label; x and y are its left, right or centre, and its middle."""

    text: str
    x: float
    y: float
    align: str = "center"

    @property
    def extent(self) -> tuple[float, float]:
        """Its left and right end, roughly."""
        width = LETTER * len(self.text)
        left = self.x - {"left": 0.0, "center": width / 2, "right": width}[self.align]
        return left, left + width


@dataclass
class Picture:
    """Everything that is drawn of one network."""

    boxes: list[Box] = field(default_factory=list)
    lines: list[list[Point]] = field(default_factory=list)
    dots: list[Point] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, bottom, right and top of everything."""
        xs = [*chain(*(label.extent for label in self.labels))]
        ys = [y for label in self.labels for y in (label.y - LABEL / 2, label.y + LABEL / 2)]
        for box in self.boxes:
            xs += (box.x - box.width / 2, box.x + box.width / 2)
            ys += (box.bottom, box.top)
        xs += (x for line in self.lines for x, _ in line)
        ys += (y for line in self.lines for _, y in line)
        return (min(xs), min(ys), max(xs), max(ys)) if xs else (0.0, 0.0, 0.0, 0.0)

    @property
    def width(self) -> float:
        """From left to right."""
        left, _, right, _ = self.bounds
        return right - left

    @property
    def height(self) -> float:
        """From bottom to top."""
        _, bottom, _, top = self.bounds
        return top - bottom
