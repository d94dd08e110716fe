"""An operand met twice with equal axes becomes a sum of squares."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain

from tn_kfac.tensor_network.lower.primitive import Primitive, sizes_of
from tn_kfac.tensor_network.network import Network, Operand


@dataclass(frozen=True)
class SquareSum(Primitive):
    """scale · Σ x² over the operand's axes that are not in `groups` (one group)."""

    scale: Fraction = Fraction(1)

    @cached_property
    def dims(self) -> list[int]:
        """The operand's dimensions that are summed."""
        kept = self.axes
        return [dim for dim, axis in enumerate(self.operands[0].axes) if axis not in kept]

    @cached_property
    def factor(self) -> float:
        """The scale as torch takes it."""
        return float(self.scale)

    @cached_property
    def is_mean(self) -> bool:
        """Whether it is a mean over neighbouring dimensions."""
        axes, dims = self.operands[0].axes, self.dims
        if not dims or dims[-1] - dims[0] >= len(dims):
            return False
        return self.scale * self.elements(axes[dim] for dim in dims) == 1


def square_sum(network: Network) -> Network | None:
    """The same operand twice, with equal axes, is a sum of squares.

    If nothing else is left, it takes in the scale, which often makes a mean of it.
    """
    operands = [n for n in network.nodes if isinstance(n, Operand)]
    for index, node in enumerate(operands):
        if node in operands[index + 1 :] and len(set(node.axes)) == len(node.axes):
            rest = list(network.nodes)
            rest.remove(node)
            rest.remove(node)
            needed = set(chain(network.output_axes, *(n.axes for n in rest)))
            kept = tuple(axis for axis in node.axes if axis in needed)
            scale = (not rest and network.scale) or Fraction(1)
            square = SquareSum((node,), (kept,), sizes_of(network, node), scale)
            return network.rebuilt(nodes=[*rest, square], scale=network.scale / scale)
    return None
