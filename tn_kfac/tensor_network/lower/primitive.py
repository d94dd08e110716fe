"""A node that a kernel computes: what all primitives have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod

from tn_kfac.tensor_network.network import Axes, Network, Node, Operand, rename


@dataclass(frozen=True)
class Primitive(Node):
    """A node that a kernel computes from operands.

    `groups` are groups of axes in the order that the kernel knows; the node's axes are
    their concatenation. `sizes` holds the sizes of all axes, also of those that the
    kernel sums over.
    """

    operands: tuple[Operand, ...]
    groups: tuple[Axes, ...]
    sizes: tuple[tuple[str, int], ...]

    @cached_property
    def axes(self) -> Axes:  # type: ignore[override]
        return tuple(chain.from_iterable(self.groups))

    @property
    def every_axis(self) -> Axes:
        return self.axes + tuple(chain.from_iterable(o.axes for o in self.operands))

    @cached_property
    def size(self) -> dict[str, int]:
        """The size of each axis."""
        return dict(self.sizes)

    def elements(self, axes: Iterable[str]) -> int:
        """How many indices the axes have together."""
        return prod(self.size[axis] for axis in set(axes))

    @property
    def flops(self) -> int:
        """Multiplications and additions of the kernel."""
        return 2 * self.elements(self.every_axis)

    @property
    def traffic(self) -> int:
        """Elements that the kernel reads."""
        return sum(self.elements(operand.axes) for operand in self.operands)

    def renamed(self, names: Mapping[str, str]) -> Primitive:
        return replace(
            self,
            sizes=tuple(sorted((names.get(axis, axis), size) for axis, size in self.sizes)),
            operands=tuple(operand.renamed(names) for operand in self.operands),
            groups=tuple(rename(group, names) for group in self.groups),
        )


def sizes_of(network: Network, node: Operand, more: Axes = ()) -> tuple[tuple[str, int], ...]:
    """The sizes of an operand's axes and of some more, as a primitive holds them."""
    return tuple(sorted((axis, network.size[axis]) for axis in {*node.axes, *more}))
