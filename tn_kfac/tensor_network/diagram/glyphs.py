"""What is drawn: a glyph for each node, a wire for each axis."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import singledispatch
from itertools import chain

from tn_kfac.tensor_network.network import Axes, Delta, Network, Node, Operand
from tn_kfac.tensor_network.pattern import Pattern


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
    """The axes, in order of first occurrence; one that a node has twice is one leg of it."""
    axes = dict.fromkeys(chain(*(n.axes for n in network.nodes), network.output_axes))
    ends = {a: tuple(i for i, n in enumerate(network.nodes) if a in n.axes) for a in axes}
    return [Wire(a, ends[a], a in network.output_axes) for a in axes if ends[a]]
