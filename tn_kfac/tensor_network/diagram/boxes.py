"""The coordinates of a diagram's rows and nodes."""

from __future__ import annotations

from itertools import pairwise

from tn_kfac.tensor_network.diagram.glyphs import Glyph, Wire, glyph
from tn_kfac.tensor_network.diagram.layout import DOWN, LEFT, RIGHT, UP, Layout, Row
from tn_kfac.tensor_network.diagram.picture import LABEL, LETTER, Box

NAME_LETTER = 0.12
"""Width of a letter of a node's name."""
STUB, LEG = 0.2, 0.36
"""Length of an open leg that leaves a line or a small node, and of one that leaves an operand."""
LINK = 0.5
"""Least length of a line between two nodes."""
ROW_GAP = 0.13
"""Between what is written in one row and in the next."""
PASSING = 0.12
"""Between rows that pass operands and what they pass, besides ROW_GAP."""
STAGGER = 0.4
"""Between nodes of one column whose legs pass one another."""
OPERAND = 0.5
"""Least width of an operand."""
NODE = 0.38
"""Height of a node that is no operand."""
DELTA, ONES = 0.26, 0.2
"""Diameter of a Kronecker delta, and of the vector of ones that a summed leg ends in."""


def row_heights(found: Layout) -> list[float]:
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
    inwards = DOWN if row.stubs == UP else UP
    need = {UP: LABEL, DOWN: 0.06}
    need[inwards] += PASSING if row.passing else 0.0
    if any(wire.is_open and wire.joins for wire in row.wires):
        need[row.stubs] = STUB + LABEL
    for node in found.bands[row.band] if row.band is not None else ():
        for side in (UP, DOWN):
            loose = any(not wire.joins for wire in found.uses(node, side))
            need[side] = max(need[side], NODE / 2 + (STUB + LABEL if loose else 0.03))
    return need[UP], need[DOWN]


def boxes(found: Layout, heights: list[float]) -> list[Box]:
    """The nodes, in the order of the network."""
    glyphs = [glyph(node) for node in found.nodes]
    bands = {row.band: y for row, y in zip(found.rows, heights, strict=True)}
    extents = [
        _operand_extent(found, node, heights)
        if node in found.operands
        else (bands[found.band(node)], DELTA if shown.kind == "delta" else NODE)
        for node, shown in enumerate(glyphs)
    ]
    turned = [_is_turned(*pair) for pair in zip(glyphs, extents, strict=True)]
    widths = [OPERAND if turn else _width(g) for turn, g in zip(turned, glyphs, strict=True)]
    xs = _xs(found, widths)
    return [
        Box(shown.text, shown.kind, xs[node], y, widths[node], height, turned[node])
        for node, (shown, (y, height)) in enumerate(zip(glyphs, extents, strict=True))
    ]


def _is_turned(shown: Glyph, extent: tuple[float, float]) -> bool:
    """Whether a node's name is turned: a long one that fits the node's height."""
    return len(shown.text) > 2 and NAME_LETTER * len(shown.text) + 0.1 < extent[1]


def _width(shown: Glyph) -> float:
    """The width of a node whose name is not turned."""
    if shown.kind == "delta":
        return DELTA
    least = OPERAND if shown.kind == "operand" else 0.42
    return max(least, NAME_LETTER * len(shown.text) + 0.16)


def _operand_extent(found: Layout, node: int, heights: list[float]) -> tuple[float, float]:
    """Centre and height of an operand, which spans the rows that it is joined to."""
    rows = list(zip(found.rows, heights, strict=True))
    ys = [y for row, y in rows if _holds(found, node, row)]
    ys = ys or [y for row, y in rows if not row.passing]
    loose = sum(not wire.joins and node in wire.ends for wire in found.wires)
    least = 0.5 if found.is_inner(node) else max(0.7, 0.32 * loose + 0.1)
    return (ys[0] + ys[-1]) / 2, max(ys[0] - ys[-1] + 0.44, least)


def _holds(found: Layout, node: int, row: Row) -> bool:
    """Whether an operand has a side in a row."""
    sides = (found.sides.get((w.axis, node)) for w in row.wires if node in w.ends)
    return any(side not in (UP, DOWN) for side in sides)


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
            nodes, links = _links(found, band, gap)
            slack = width - sum(links) - sum(widths[node] for node in nodes)
            slack = slack / len(links) if len(found.operands) > 1 else 0.0
            x = right + _stagger(found, number, gap)
            for node, link in zip(nodes, links, strict=False):
                xs[node] = x + slack + link + widths[node] / 2
                x += slack + link + widths[node]
        right += width
    if len(found.operands) > 1:
        operand = found.operands[-1]
        xs[operand] = right + widths[operand] / 2
    return xs


def _gap_width(found: Layout, gap: int, widths: list[float]) -> float:
    """The width that the widest band in a gap asks for."""
    wires = [wire for row in found.rows if row.band is None for wire in row.wires]
    loose = [
        w for w in wires if not w.joins and found.span(w)[0] < gap + 1 and found.span(w)[1] > gap
    ]
    needed = [1.2, *(LETTER * len(wire.axis) + 0.5 for wire in wires)]
    needed.append(sum(LETTER * len(wire.axis) + LEG + 0.15 for wire in loose))
    for number, band in enumerate(found.bands):
        nodes, links = _links(found, band, gap)
        extra = 2 * abs(_stagger(found, number, gap))
        needed.append(sum(links) + sum(widths[node] for node in nodes) + extra)
    return max(needed)


def _links(found: Layout, band: list[int], gap: int) -> tuple[list[int], list[float]]:
    """The nodes of a band in a gap, and the least lengths of what lies between them."""
    nodes = sorted((n for n in band if found.gap(n) == gap), key=lambda n: found.columns[n])
    links = []
    for left, right in pairwise([None, *nodes, None]):
        uses = found.uses(left, RIGHT) if left is not None else []
        uses = uses + (found.uses(right, LEFT) if right is not None else [])
        ones = sum(ones_leg(wire) + ONES for wire in uses if not wire.joins)
        names = (LETTER * len(wire.axis) + 0.24 for wire in uses)
        links.append(max([LINK, *names, ones + 0.15]))
    return nodes, links


def ones_leg(wire: Wire) -> float:
    """The length of a summed leg, which has its label above it."""
    return max(LEG, LETTER * len(wire.axis) + 0.1)


def _stagger(found: Layout, band: int, gap: int) -> float:
    """A shift of bands that others separate from the rows which pass operands."""
    if len(found.operands) < 3:
        return 0.0
    depth = band if found.is_high(band) else len(found.bands) - 1 - band
    return STAGGER * depth * (1 if gap < (len(found.operands) - 1) / 2 else -1)
