"""Where the nodes of a diagram stand: columns and bands, no coordinates.

Operands stand in columns, the second copy of each (of a gram) mirrored to the right.
All other nodes stand between them, in bands: what is joined, or belongs to one spatial
dimension, shares a band.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from math import floor

from tn_kfac.tensor_network.diagram.glyphs import Wire, glyph, wires_of
from tn_kfac.tensor_network.network import Network, Node, Operand

LEFT, RIGHT, UP, DOWN = "left", "right", "up", "down"


@dataclass
class Row:
    """Axes that run in one row; `band` numbers the band whose nodes stand in it.

    `passing` rows are over or under the inner operands; open legs leave to the side `stubs`.
    """

    wires: list[Wire] = field(default_factory=list)
    band: int | None = None
    passing: bool = False
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

    def is_inner(self, node: int) -> bool:
        """Whether a node is an operand between operands."""
        return node in self.operands[1:-1]

    def band(self, node: int) -> int | None:
        """The number of the band that a node stands in; None for operands."""
        return next((number for number, band in enumerate(self.bands) if node in band), None)

    def band_of(self, wire: Wire) -> int | None:
        """The band of the first node of the wire that stands in one."""
        found = map(self.band, wire.ends)
        return next((number for number in found if number is not None), None)

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
    """The columns and bands of a network's nodes; rows and sides are still to be found."""
    wires = wires_of(network)
    operands = _operands(network.nodes)
    columns = {node: float(column) for column, node in enumerate(operands)}
    means = _means(network.nodes, wires, columns)
    bands = _bands(network.nodes, wires, list(means))
    for band in bands:
        columns |= _between(band, means, len(operands))
    return Layout(network.nodes, operands, bands, columns, wires)


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
