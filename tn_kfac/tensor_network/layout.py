"""Where the nodes of a diagram stand, and in which row each axis runs; no coordinates.

Operands stand in columns, the second copy of each (of a gram) mirrored to the right.
All other nodes stand between them, in bands: what is joined, or belongs to one spatial
dimension, shares a band. An axis runs horizontally in a row: the band's own, one next
to it, one between the bands, or over and under the operands that it must pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import singledispatch
from itertools import chain
from math import floor

from tn_kfac.tensor_network.network import Axes, Delta, Network, Node, Operand
from tn_kfac.tensor_network.pattern import Pattern

LEFT, RIGHT, UP, DOWN = "left", "right", "up", "down"


@dataclass(frozen=True)
class Glyph:
    """What is written in a node, which kind it is, and its spatial dimension, if it has one."""

    text: str
    kind: str
    dimension: str = ""


@singledispatch
def glyph(node: Node) -> Glyph:
    """How a node is drawn."""
    return Glyph(type(node).__name__, "other", _dimension(node.axes))


@glyph.register
def _(node: Operand) -> Glyph:
    return Glyph(node.name, "operand")


@glyph.register
def _(node: Delta) -> Glyph:
    return Glyph("δ", "delta")


@glyph.register
def _(node: Pattern) -> Glyph:
    dimension = _dimension(node.axes)
    subscript = dimension.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
    if node.is_full:
        return Glyph(f"Π{subscript}", "pattern", dimension)
    return Glyph(f"S{subscript}", "count", dimension)


def _dimension(axes: Axes) -> str:
    """The number in an axis's name."""
    numbers = (re.search(r"\d+", axis) for axis in axes)
    return next((number.group() for number in numbers if number), "")


@dataclass(frozen=True)
class Wire:
    """An axis: the nodes that have it (by position), and whether the output has it."""

    axis: str
    ends: tuple[int, ...]
    is_open: bool

    @property
    def joins(self) -> bool:
        """Whether the wire joins nodes; otherwise it is the loose leg of one."""
        return len(self.ends) > 1


def wires_of(network: Network) -> list[Wire]:
    """The axes, in order of first occurrence."""
    axes = dict.fromkeys(chain(*(n.axes for n in network.nodes), network.output_axes))
    ends = {a: tuple(i for i, n in enumerate(network.nodes) if a in n.axes) for a in axes}
    return [Wire(a, ends[a], a in network.output_axes) for a in axes if ends[a]]


@dataclass
class Row:
    """Axes that run in one row; `band` numbers the band whose nodes stand in it."""

    wires: list[Wire] = field(default_factory=list)
    band: int | None = None
    stubs: str = UP


@dataclass
class Layout:
    """Nodes in columns and bands, wires in rows (top to bottom), and the sides they leave by."""

    nodes: tuple[Node, ...]
    operands: tuple[int, ...]
    bands: list[list[int]]
    columns: dict[int, float]
    wires: list[Wire]
    rows: list[Row] = field(default_factory=list)
    sides: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def gaps(self) -> int:
        """The number of places between operands (one beside a single operand)."""
        return max(len(self.operands) - 1, 1)

    def gap(self, node: int) -> int:
        """The gap that a node stands in, or that is right of an operand."""
        return min(floor(self.columns[node]), self.gaps - 1)

    def band_of(self, wire: Wire) -> int | None:
        """The band of the first node of the wire that stands in one."""
        found = (b for e in wire.ends for b, band in enumerate(self.bands) if e in band)
        return next(found, None)

    def span(self, wire: Wire) -> tuple[float, float]:
        """The outermost columns that a wire joins."""
        columns = [self.columns[end] for end in wire.ends]
        if not wire.joins:
            columns.append(columns[0] + (0.5 if self.opens_right(wire.ends[0]) else -0.5))
        return min(columns), max(columns)

    def opens_right(self, operand: int) -> bool:
        """Whether legs of an operand without a partner leave to the right."""
        last = len(self.operands) - 1
        at = self.columns[operand]
        return at == last if at in (0, last) and last else 0 < at < last / 2

    def passes(self, wire: Wire) -> bool:
        """Whether an operand stands between the ends of the wire."""
        low, high = self.span(wire)
        return any(low < self.columns[operand] < high for operand in self.operands)

    def uses(self, node: int, side: str) -> list[Wire]:
        """The wires that leave a node by one side."""
        return [w for w in self.wires if self.sides.get((w.axis, node)) == side]

    def is_high(self, band: int) -> bool:
        """Whether a band's wires pass operands above, not below them."""
        return 2 * band < len(self.bands)


def layout(network: Network) -> Layout:
    """The layout of a network's diagram."""
    wires = wires_of(network)
    operands = _operands(network.nodes)
    columns = {node: float(column) for column, node in enumerate(operands)}
    means = _means(network.nodes, wires, columns)
    bands = _bands(network.nodes, wires, list(means))
    for band in bands:
        columns |= _between(band, means, len(operands))
    found = Layout(network.nodes, operands, bands, columns, wires)
    _route(found)
    return found


def _operands(nodes: tuple[Node, ...]) -> tuple[int, ...]:
    """The operands from left to right. Matrices besides two others do not count: they are links."""
    operands = {i: node for i, node in enumerate(nodes) if isinstance(node, Operand)}
    if len({node.name for node in operands.values()}) > 2:
        operands = {i: n for i, n in operands.items() if len(n.axes) > 2} or operands
    names = [node.name for node in operands.values()]
    first = [i for at, (i, node) in enumerate(operands.items()) if node.name not in names[:at]]
    second = [i for i in operands if i not in first]
    return (*first, *reversed(second))


def _means(
    nodes: tuple[Node, ...], wires: list[Wire], columns: dict[int, float]
) -> dict[int, float]:
    """For each node that is no column, the mean column of the operands next (or near) to it."""
    known = dict(columns)
    while True:
        found: dict[int, float] = {}
        for node in (n for n in range(len(nodes)) if n not in known):
            near = chain.from_iterable(w.ends for w in wires if node in w.ends)
            at = [known[n] for n in near if n in known]
            if at:
                found[node] = sum(at) / len(at)
        if not found:
            break
        known |= found
    centre = max(len(columns) - 1, 0) / 2
    return {n: known.get(n, centre) for n in range(len(nodes)) if n not in columns}


def _bands(nodes: tuple[Node, ...], wires: list[Wire], loose: list[int]) -> list[list[int]]:
    """Nodes that are joined or have one spatial dimension, together; in order of appearance."""
    dimension = {node: glyph(nodes[node]).dimension for node in loose}
    links = [{node for node in loose if node in wire.ends} for wire in wires]
    links += [{n for n in loose if dimension[n] == d} for d in set(dimension.values()) if d]
    bands = [{node} for node in loose]
    for link in links:
        joined = [band for band in bands if band & link]
        bands = [band for band in bands if not band & link]
        bands += [set().union(*joined)] if joined else []
    return sorted(sorted(band) for band in bands)


def _between(band: list[int], means: dict[int, float], operands: int) -> dict[int, float]:
    """Columns of a band's nodes: evenly spread in the gap between operands that suits each."""
    last, centre = max(operands - 2, 0), (operands - 1) / 2
    gaps: dict[int, list[int]] = {}
    for node in sorted(band, key=lambda node: (means[node], node)):
        mean = means[node]
        gap = floor(mean) - (mean == floor(mean) and mean >= centre)
        gaps.setdefault(min(max(gap, 0), last), []).append(node)
    return {
        node: gap + (at + 1) / (len(members) + 1)
        for gap, members in gaps.items()
        for at, node in enumerate(members)
    }


def _route(found: Layout) -> None:
    """Give each wire that joins nodes its row, and each end of a wire its side."""
    joining = [wire for wire in found.wires if wire.joins]
    passing = [wire for wire in joining if found.passes(wire)]
    direct = [wire for wire in joining if wire not in passing]
    over, under = _passing_rows(found, passing)
    bands = [
        _band_rows(found, number, [w for w in direct if found.band_of(w) == number])
        for number in range(len(found.bands))
    ]
    inner = [w for w in found.wires if not w.joins and w.ends[0] in found.operands[1:-1]]
    lanes = _shared([w for w in direct if found.band_of(w) is None] + inner, found)
    for wire in (w for w in found.wires if not w.joins):
        found.sides[wire.axis, wire.ends[0]] = _loose_side(found, wire)
    high = sum(map(found.is_high, range(len(bands)))) if passing else 0
    top, bottom = chain.from_iterable(bands[:high]), chain.from_iterable(bands[high:])
    found.rows = [*over, *top, *lanes, *bottom, *under]


def _passing_rows(found: Layout, passing: list[Wire]) -> tuple[list[Row], list[Row]]:
    """Rows over and under the operands; those that drop onto most nodes are the nearest."""
    inner = found.operands[1:-1]
    over, under = [], []
    for wire in sorted(passing, key=lambda wire: len(set(wire.ends) & set(inner))):
        band = found.band_of(wire)
        above = len(over) <= len(under) if band is None else found.is_high(band)
        (over if above else under).append(wire)
        for end in wire.ends:
            if end not in (found.operands[0], found.operands[-1]):
                found.sides[wire.axis, end] = UP if above else DOWN
    return [Row([w]) for w in over], [Row([w], stubs=DOWN) for w in reversed(under)]


def _band_rows(found: Layout, number: int, wires: list[Wire]) -> list[Row]:
    """The row of a band, and rows above and below it for what does not fit into it."""
    band = found.bands[number]
    main, above, below = Row(band=number), [], []
    for wire in sorted(wires, key=lambda wire: _importance(found, band, wire)):
        ends = [end for end in wire.ends if end in band]
        sides = {end: _facing(found, wire, end) for end in ends}
        inside = any(side is None for side in sides.values())
        if inside or any(found.uses(end, side) for end, side in sides.items() if side):
            sides = dict.fromkeys(ends, UP if inside else DOWN)
            (above if inside else below).append(wire)
        else:
            main.wires.append(wire)
        found.sides |= {(wire.axis, end): side for end, side in sides.items() if side}
    lower = _shared(below, found)
    for row in lower:
        row.stubs = DOWN
    return [*_shared(above, found), main, *lower]


def _importance(found: Layout, band: list[int], wire: Wire) -> int:
    """Patterns list kernel, output, input: the last axis is drawn first, straight."""
    node = next(end for end in wire.ends if end in band)
    return -found.nodes[node].axes.index(wire.axis)


def _facing(found: Layout, wire: Wire, node: int) -> str | None:
    """The side of a node that faces the rest of its wire; None if the way is not free."""
    low, high = found.span(wire)
    at = found.columns[node]
    band = next(band for band in found.bands if node in band)
    if any(low < found.columns[other] < high for other in band):
        return None
    return RIGHT if at == low else LEFT


def _shared(wires: Iterable[Wire], found: Layout) -> list[Row]:
    """Rows for wires; those that do not overlap share one. Open ones come first."""
    rows: list[Row] = []
    for wire in sorted(wires, key=lambda wire: not wire.is_open):
        low, high = found.span(wire)
        spans = ((row, [found.span(other) for other in row.wires]) for row in rows)
        free = (row for row, taken in spans if all(high <= a or b <= low for a, b in taken))
        row = next(free, None)
        if row is None:
            rows.append(row := Row())
        row.wires.append(wire)
    return rows


def _loose_side(found: Layout, wire: Wire) -> str:
    """The side that a leg without a partner leaves by: outwards, or down."""
    node = wire.ends[0]
    at = found.columns[node]
    if node in found.operands:
        return RIGHT if found.opens_right(node) else LEFT
    free = [s for s in (RIGHT, LEFT, DOWN, UP) if not found.uses(node, s)]
    band = next(band for band in found.bands if node in band)
    last = len(found.operands) < 2 and at == max(found.columns[other] for other in band)
    kernel = wire.axis == found.nodes[node].axes[0]
    if RIGHT in free and ((last and not kernel) or not wire.is_open):
        return RIGHT
    if LEFT in free and not wire.is_open:
        return LEFT
    return DOWN if DOWN in free else free[0] if free else DOWN
