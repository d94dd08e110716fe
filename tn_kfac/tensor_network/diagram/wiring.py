"""The lines, dots and labels of a diagram, drawn between its boxes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise

from tn_kfac.tensor_network.diagram.boxes import LEG, ONES, STUB, boxes, ones_leg, row_heights
from tn_kfac.tensor_network.diagram.glyphs import Wire
from tn_kfac.tensor_network.diagram.layout import DOWN, RIGHT, UP, Layout, Row
from tn_kfac.tensor_network.diagram.picture import LABEL, LETTER, Box, Label, Picture, Point
from tn_kfac.tensor_network.diagram.routes import routed
from tn_kfac.tensor_network.network import Network


def picture(network: Network) -> Picture:
    """The diagram of a network."""
    found = routed(network)
    heights = row_heights(found)
    return _Wiring(found, boxes(found, heights), heights).drawn()


class _Wiring:
    """Draws wires between boxes; labels last, where they do not meet what is drawn."""

    def __init__(self, found: Layout, boxes: list[Box], heights: list[float]) -> None:
        self.found = found
        self.boxes = boxes
        self.picture = Picture(list(boxes))
        rows = zip(found.rows, heights, strict=True)
        self.runs = [(wire, row, y) for row, y in rows for wire in row.wires]

    def drawn(self) -> Picture:
        """The picture of everything."""
        joining = [run for run in self.runs if run[0].joins]
        for wire, _, y in joining:
            self._join(wire, y)
        heights = {wire: y for wire, _, y in self.runs}
        for operand in self.found.operands:
            heights |= self._spread(operand, heights)
        for wire in (wire for wire in self.found.wires if not wire.joins):
            self._loose_leg(wire, heights.get(wire))
        for wire, row, y in joining:
            self._name(wire, row, y)
        return self.picture

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

    def _spread(self, operand: int, known: Collection[Wire]) -> dict[Wire, float]:
        """The heights of an operand's legs without partner, but for those in rows."""
        wires = (w for w in self.found.wires if not w.joins and operand in w.ends)
        loose = [wire for wire in wires if wire not in known]
        box = self.boxes[operand]
        pitch = min(0.44, box.height / max(len(loose), 1))
        top = box.y + pitch * (len(loose) - 1) / 2
        return {wire: top - pitch * place for place, wire in enumerate(loose)}

    def _loose_leg(self, wire: Wire, y: float | None) -> None:
        """A leg with one end: open, or summed, which a vector of ones stands for."""
        (node,) = wire.ends
        box, side = self.boxes[node], self.found.sides[wire.axis, node]
        if side in (UP, DOWN):
            self._vertical_leg(wire, box, self._port(wire, node, side), side == UP)
        else:
            self._side_leg(wire, box, box.y if y is None else y, side == RIGHT)

    def _side_leg(self, wire: Wire, box: Box, y: float, right: bool) -> None:
        sign = 1 if right else -1
        x = box.x + sign * box.width / 2
        end = x + sign * (LEG if wire.is_open else ones_leg(wire))
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
        if wire.is_open:
            self.picture.labels.append(Label(wire.axis, x, end + sign * LABEL / 2))
        else:
            self._ones(x, end + sign * ONES / 2)
            self.picture.labels.append(Label(wire.axis, x + ONES / 2 + 0.05, end, "left"))

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
