"""An operand met twice with equal axes becomes a sum of squares."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from tn_kfac.tensor_network.lower.primitive import Primitive, sizes_of
from tn_kfac.tensor_network.network import Network, Operand


@dataclass(frozen=True)
class SquareSum(Primitive):
    """Σ x² over the operand's axes that are not in `groups` (one group)."""


def square_sum(network: Network) -> Network | None:
    """The same operand twice, with equal axes, is a sum of squares."""
    operands = [n for n in network.nodes if isinstance(n, Operand)]
    for index, node in enumerate(operands):
        if node in operands[index + 1 :] and len(set(node.axes)) == len(node.axes):
            rest = list(network.nodes)
            rest.remove(node)
            rest.remove(node)
            needed = set(chain(network.output_axes, *(n.axes for n in rest)))
            kept = tuple(axis for axis in node.axes if axis in needed)
            return network.rebuilt(
                nodes=[*rest, SquareSum((node,), (kept,), sizes_of(network, node))]
            )
    return None
