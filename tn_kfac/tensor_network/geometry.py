"""The coordinates of a diagram: boxes, lines, dots and labels, in inches, y upwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, pairwise

from tn_kfac.tensor_network.layout import (
    DOWN,
    RIGHT,
    UP,
    Glyph,
    Layout,
    Row,
    Wire,
    glyph,
    layout,
)
from tn_kfac.tensor_network.network import Network

Point = tuple[float, float]

LETTER, NAME_LETTER = 0.085, 0.12
"""Width of a letter of an axis label, and of a node's name."""
LABEL = 0.2
"""Height of an axis label with its distance from the line."""
STUB, LEG = 0.2, 0.36
"""Length of an open leg that leaves a line or a small node, and of one that leaves an operand."""
LINK = 0.5
"""Least length of a line between two nodes."""
ROW_GAP = 0.1
"""Between what is written in one row and in the next."""
NODE = 0.38
"""Height of a node that is no operand."""
ONES = 0.2
"""Diameter of the vector of ones that a summed leg ends in."""


@dataclass(frozen=True)
class Box:
    """A node, by its centre."""

    text: str
    kind: str
    x: float
    y: float
    width: float
    height: float

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


def picture(network: Network) -> Picture:
    """The diagram of a network."""
    found = layout(network)
    glyphs = [glyph(node) for node in network.nodes]
    heights = _row_heights(found)
    boxes = _boxes(found, glyphs, heights)
    return _Wiring(found, boxes, heights).picture


def _row_heights(found: Layout) -> list[float]:
    """The y of each row."""
    y, heights = 0.0, []
    for row in found.rows:
        up, down = _clearance(found, row)
        y -= up
        heights.append(y)
        y -= down + ROW_GAP
    return heights


def _clearance(found: Layout, row: Row) -> tuple[float, float]:
    """What a row needs above and below its line."""
    need = {UP: LABEL, DOWN: 0.06}
    if any(wire.is_open and wire.joins for wire in row.wires):
        need[row.stubs] = STUB + LABEL
    for node in found.bands[row.band] if row.band is not None else ():
        for side in (UP, DOWN):
            loose = any(not wire.joins for wire in found.uses(node, side))
            need[side] = max(need[side], NODE / 2 + (STUB + LABEL if loose else 0.03))
    return need[UP], need[DOWN]


def _width(shown: Glyph) -> float:
    if shown.kind == "delta":
        return 0.26
    least = 0.5 if shown.kind == "operand" else 0.42
    return max(least, NAME_LETTER * len(shown.text) + 0.16)


def _boxes(found: Layout, glyphs: list[Glyph], heights: list[float]) -> list[Box]:
    """The nodes, in the order of the network."""
    widths = [_width(shown) for shown in glyphs]
    for operand in found.operands:
        widths[operand] = max(widths[other] for other in found.operands)
    xs = _xs(found, widths)
    rows = {row.band: y for row, y in zip(found.rows, heights, strict=True)}
    boxes = []
    for node, shown in enumerate(glyphs):
        if node in found.operands:
            y, height = _operand_extent(found, node, heights)
        else:
            number = next(b for b, band in enumerate(found.bands) if node in band)
            y, height = rows[number], 0.26 if shown.kind == "delta" else NODE
        boxes.append(Box(shown.text, shown.kind, xs[node], y, widths[node], height))
    return boxes


def _operand_extent(found: Layout, node: int, heights: list[float]) -> tuple[float, float]:
    """Centre and height of an operand, which spans the rows that it is joined to."""
    ys = [
        y
        for row, y in zip(found.rows, heights, strict=True)
        if any(node in w.ends and (w.axis, node) not in found.sides for w in row.wires)
    ]
    loose = sum(not wire.joins and node in wire.ends for wire in found.wires)
    top, bottom = (max(ys), min(ys)) if ys else (heights[0], heights[-1]) if heights else (0, 0)
    return (top + bottom) / 2, max(top - bottom + 0.44, 0.32 * loose + 0.1, 0.7)


def _xs(found: Layout, widths: list[float]) -> dict[int, float]:
    """The horizontal centre of each node."""
    xs: dict[int, float] = {}
    right = 0.0
    for gap in range(found.gaps):
        if gap < len(found.operands):
            operand = found.operands[gap]
            xs[operand] = right + widths[operand] / 2
            right += widths[operand]
        width = _gap_width(found, gap, widths)
        for number, band in enumerate(found.bands):
            nodes = [node for node in band if found.gap(node) == gap]
            nodes.sort(key=lambda node: found.columns[node])
            free = width - sum(widths[node] for node in nodes)
            step = free / (len(nodes) + (len(found.operands) > 1)) if nodes else 0.0
            x = right + _stagger(found, number, gap)
            for node in nodes:
                x += step + widths[node]
                xs[node] = x - widths[node] / 2
        right += width
    if len(found.operands) > 1:
        operand = found.operands[-1]
        xs[operand] = right + widths[operand] / 2
    return xs


def _gap_width(found: Layout, gap: int, widths: list[float]) -> float:
    """The width that the widest band in a gap asks for."""
    needed = [1.2]
    for row in found.rows:
        inside = [w for w in row.wires if found.span(w)[0] <= gap + 1 and found.span(w)[1] >= gap]
        link = max([LINK, *(LETTER * len(w.axis) + 0.25 for w in inside)])
        nodes = (
            [n for n in found.bands[row.band] if found.gap(n) == gap]
            if row.band is not None
            else []
        )
        needed.append(sum(widths[n] for n in nodes) + (len(nodes) + 1) * link)
    extra = max(abs(_stagger(found, b, gap)) for b in range(len(found.bands))) if found.bands else 0
    return max(needed) + 2 * extra


def _stagger(found: Layout, band: int, gap: int) -> float:
    """A shift of bands that others separate from the rows which pass operands."""
    if len(found.operands) < 3:
        return 0.0
    last = len(found.bands) - 1
    high = sum(map(found.is_high, range(last + 1)))
    depth = band if found.is_high(band) else last - band
    sign = 1 if gap < (len(found.operands) - 1) / 2 else -1
    return sign * 0.4 * (depth if high else 0)


class _Wiring:
    """Draws the wires between boxes."""

    def __init__(self, found: Layout, boxes: list[Box], heights: list[float]) -> None:
        self.found = found
        self.boxes = boxes
        self.picture = Picture(list(boxes))
        self.rows = [
            (w, row, y) for row, y in zip(found.rows, heights, strict=True) for w in row.wires
        ]
        for wire, _, y in self.rows:
            if wire.joins:
                self._join(wire, y)
        self._loose_legs()
        for wire, row, y in self.rows:
            if wire.joins:
                self._name(wire, row, y)

    def _attached(self, wire: Wire, end: int, y: float) -> tuple[Point, Point]:
        """Where a wire that runs at height y leaves a node, and where it meets its row."""
        box, side = self.boxes[end], self.found.sides.get((wire.axis, end))
        if side in (UP, DOWN):
            x = self._port(wire, end, side)
            return (x, box.top if side == UP else box.bottom), (x, y)
        at = self.found.columns[end]
        right = side == RIGHT if side else at < sum(self.found.span(wire)) / 2
        x = box.x + (box.width if right else -box.width) / 2
        return (x, y), (x, y)

    def _port(self, wire: Wire, node: int, side: str) -> float:
        """The x at which a wire leaves a node upwards or downwards."""
        uses, box = self.found.uses(node, side), self.boxes[node]
        at = uses.index(wire)
        return box.x + box.width * ((at + 1) / (len(uses) + 1) - 0.5)

    def _join(self, wire: Wire, y: float) -> None:
        """A line along the row, and what drops from it."""
        ends = sorted((self._attached(wire, end, y) for end in wire.ends), key=lambda e: e[1][0])
        (first, start), *drops, (last, stop) = ends
        line = [first, start, stop, last]
        self.picture.lines.append([p for p, q in pairwise([*line, (0.0, 0.0)]) if p != q])
        for leaves, meets in drops:
            self.picture.lines.append([leaves, meets])
            self.picture.dots.append(meets)

    def _name(self, wire: Wire, row: Row, y: float) -> None:
        """The label of a wire, on its open leg if it has one."""
        meets = sorted(self._attached(wire, end, y)[1][0] for end in wire.ends)
        x = _free(meets, self._crossings(y, meets[0], meets[-1]), LETTER * len(wire.axis) + 0.1)
        if not wire.is_open:
            self.picture.labels.append(Label(wire.axis, x, y + LABEL / 2))
            return
        sign = 1 if row.stubs == UP else -1
        self.picture.dots.append((x, y))
        self.picture.lines.append([(x, y), (x, y + sign * STUB)])
        self.picture.labels.append(Label(wire.axis, x, y + sign * (STUB + LABEL / 2)))

    def _crossings(self, y: float, left: float, right: float) -> Iterable[float]:
        """Where vertical lines cross, or end at, a row."""
        for line in self.picture.lines:
            for (x, low), (other, high) in pairwise(line):
                crosses = min(low, high) <= y + LABEL and max(low, high) >= y
                if x == other and crosses and left < x < right:
                    yield x

    def _loose_legs(self) -> None:
        """Legs with one end: open, or summed, which a vector of ones stands for."""
        at = {wire: y for wire, _, y in self.rows}
        for operand in self.found.operands:
            box = self.boxes[operand]
            loose = [
                w for w in self.found.wires if not w.joins and operand in w.ends and w not in at
            ]
            pitch = min(0.44, box.height / max(len(loose), 1))
            for place, wire in enumerate(loose):
                at[wire] = box.y + pitch * ((len(loose) - 1) / 2 - place)
        for wire in (w for w in self.found.wires if not w.joins):
            (node,) = wire.ends
            box, side = self.boxes[node], self.found.sides[wire.axis, node]
            y = at.get(wire, box.y)
            if side in (UP, DOWN):
                self._vertical_leg(wire, box, self._port(wire, node, side), side == UP)
            else:
                self._side_leg(wire, box, y, side == RIGHT)

    def _side_leg(self, wire: Wire, box: Box, y: float, right: bool) -> None:
        sign = 1 if right else -1
        x = box.x + sign * box.width / 2
        end = x + sign * LEG
        self.picture.lines.append([(x, y), (end, y)])
        if wire.is_open:
            align = "left" if right else "right"
            self.picture.labels.append(Label(wire.axis, end + sign * 0.05, y, align))
        else:
            self._ones(end + sign * ONES / 2, y)
            self.picture.labels.append(Label(wire.axis, (x + end) / 2, y + LABEL / 2))

    def _vertical_leg(self, wire: Wire, box: Box, x: float, up: bool) -> None:
        sign = 1 if up else -1
        y = box.top if up else box.bottom
        end = y + sign * STUB
        self.picture.lines.append([(x, y), (x, end)])
        self.picture.labels.append(Label(wire.axis, x, end + sign * LABEL / 2))
        if not wire.is_open:
            self._ones(x, end)

    def _ones(self, x: float, y: float) -> None:
        self.picture.boxes.append(Box("1", "ones", x, y, ONES, ONES))


def _free(meets: list[float], crossings: Iterable[float], width: float) -> float:
    """The middle of the free stretch of a line: around its own middle, else the longest."""
    cuts = sorted({*meets, *crossings})
    stretches = list(pairwise(cuts)) or [(meets[0], meets[0])]
    centre = (meets[0] + meets[-1]) / 2

    def rank(stretch: tuple[float, float]) -> tuple[bool, float]:
        low, high = stretch
        return low < centre < high and high - low >= width, round(high - low, 6)

    low, high = max(stretches, key=rank)
    return (low + high) / 2
