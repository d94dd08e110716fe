"""In which row each axis runs, and by which side it leaves its nodes.

Rows are horizontal: a band's own, one next to it, one between the bands, or one over or
under the operands that it must pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from tn_kfac.tensor_network.diagram.glyphs import Wire
from tn_kfac.tensor_network.diagram.layout import DOWN, LEFT, RIGHT, UP, Layout, Row, layout
from tn_kfac.tensor_network.network import Network


def routed(network: Network) -> Layout:
    """The layout of a network's diagram, with rows and sides."""
    found = layout(network)
    _route(found)
    return found


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
    inner = [w for w in found.wires if not w.joins and found.is_inner(w.ends[0])]
    lanes = _shared([w for w in direct if found.band_of(w) is None] + inner, found)
    for wire in (w for w in found.wires if not w.joins):
        found.sides[wire.axis, wire.ends[0]] = _loose_side(found, wire)
    high = sum(map(found.is_high, range(len(bands)))) if passing else 0
    top, bottom = chain.from_iterable(bands[:high]), chain.from_iterable(bands[high:])
    found.rows = [*over, *([*top, *lanes, *bottom] or [Row()]), *under]


def _passing_rows(found: Layout, passing: list[Wire]) -> tuple[list[Row], list[Row]]:
    """Rows over and under the operands; those that drop onto most nodes are the nearest."""
    over, under = [], []
    for wire in sorted(passing, key=lambda wire: sum(map(found.is_inner, wire.ends))):
        band = found.band_of(wire)
        above = len(over) <= len(under) if band is None else found.is_high(band)
        (over if above else under).append(wire)
        for end in wire.ends:
            if end not in (found.operands[0], found.operands[-1]):
                found.sides[wire.axis, end] = UP if above else DOWN
    upper = [Row([wire], passing=True) for wire in over]
    return upper, [Row([wire], passing=True, stubs=DOWN) for wire in reversed(under)]


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
    band = found.bands[found.band_of(wire) or 0]
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
    wished = [DOWN, RIGHT, LEFT, UP] if wire.is_open else [RIGHT, LEFT, DOWN, UP]
    band = found.bands[found.band_of(wire) or 0]
    last = len(found.operands) < 2 and at == max(found.columns[other] for other in band)
    if last and wire.axis != found.nodes[node].axes[0]:  # a pattern's first axis is its kernel
        wished.insert(0, RIGHT)
    return next((side for side in wished if not found.uses(node, side)), DOWN)
