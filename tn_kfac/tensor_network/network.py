"""The frozen intermediate representation of a tensor network, and its operators.

A network is a product of nodes, summed over every axis that is not an output:

    T[output] = scale · Σ_{other axes} Π_nodes node[axes]

Axes are words. An axis may occur in any number of nodes (a hyper-edge), so a
Kronecker delta between two axes is the same as giving both one name. Nothing
here touches a tensor: networks hash, compare and serve as cache keys.

Derivatives follow one invariant: a network is *linear in each of its nodes*, so
its derivative with respect to a node is the network without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import chain
from math import prod

Axes = tuple[str, ...]


class Node(ABC):
    """A factor of the product. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def axes(self) -> Axes:
        """The node's axes, in the order of its tensor's dimensions."""

    @property
    def every_axis(self) -> Axes:
        """The node's axes, and those that it sums over inside."""
        return self.axes

    @abstractmethod
    def renamed(self, names: Mapping[str, str]) -> Node:
        """The same node with axes renamed by `names` (others are kept)."""


@dataclass(frozen=True)
class Window:
    """A strided view of one dimension as two: index = output·stride + kernel·dilation.

    Zeros are added in front and behind first, as many as `padding` says.
    """

    outputs: int
    stride: int
    kernels: int
    dilation: int
    padding: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Leg:
    """Consecutive dimensions of an operand, read as the row-major product of `axes`.

    `windows` has one entry per dimension that the leg covers; a window is applied
    before the split into axes.
    """

    axes: Axes
    windows: tuple[Window | None, ...] = (None,)

    def substituted(self, axis: str, axes: Axes) -> Leg:
        """The leg with `axis` replaced by `axes` (none: the axis is dropped)."""
        return replace(self, axes=substitute(self.axes, axis, axes))


@dataclass(frozen=True)
class Operand(Node):
    """A tensor that the caller supplies under `name` when the network is evaluated."""

    name: str
    legs: tuple[Leg, ...]

    @cached_property
    def axes(self) -> Axes:  # type: ignore[override]
        return tuple(chain.from_iterable(leg.axes for leg in self.legs))

    def renamed(self, names: Mapping[str, str]) -> Operand:
        return replace(
            self, legs=tuple(replace(leg, axes=rename(leg.axes, names)) for leg in self.legs)
        )


@dataclass(frozen=True)
class Delta(Node):
    """The Kronecker delta δ(left, right)."""

    left: str
    right: str

    @property
    def axes(self) -> Axes:
        return (self.left, self.right)

    def renamed(self, names: Mapping[str, str]) -> Delta:
        return Delta(*rename(self.axes, names))


@dataclass(frozen=True)
class Ones(Node):
    """A vector of ones: the result is constant along the axis."""

    axis: str

    @property
    def axes(self) -> Axes:
        return (self.axis,)

    def renamed(self, names: Mapping[str, str]) -> Ones:
        return Ones(*rename(self.axes, names))


def operand(name: str, *legs: str | Axes) -> Operand:
    """An operand with one leg per dimension: a word, or a tuple of words for a product."""
    return Operand(name, tuple(Leg((leg,) if isinstance(leg, str) else leg) for leg in legs))


def rename(axes: Axes, names: Mapping[str, str]) -> Axes:
    """`axes` under `names`; axes without an entry keep their name."""
    return tuple(names.get(axis, axis) for axis in axes)


def substitute(axes: Axes, axis: str, replacement: Axes) -> Axes:
    """`axes` with each occurrence of `axis` replaced by the axes of `replacement`."""
    return tuple(chain.from_iterable(replacement if a == axis else (a,) for a in axes))


@dataclass(frozen=True)
class Network:
    """A tensor network: nodes, output dimensions (groups of axes), sizes and a scale."""

    nodes: tuple[Node, ...]
    output: tuple[Axes, ...]
    sizes: tuple[tuple[str, int], ...]
    scale: Fraction = Fraction(1)

    @staticmethod
    def build(
        nodes: Iterable[Node],
        output: Iterable[Axes],
        sizes: Mapping[str, int],
        scale: Fraction = Fraction(1),
    ) -> Network:
        """A network whose sizes are those of the axes that occur, in a canonical order."""
        nodes, output = tuple(nodes), tuple(output)
        used = set(chain(*(node.axes for node in nodes), *output))
        return Network(nodes, output, tuple(sorted((a, sizes[a]) for a in used)), scale)

    @cached_property
    def size(self) -> dict[str, int]:
        """The size of each axis."""
        return dict(self.sizes)

    @cached_property
    def output_axes(self) -> Axes:
        """The output's axes, flat."""
        return tuple(chain.from_iterable(self.output))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that the network stands for."""
        return tuple(prod(self.size[a] for a in group) for group in self.output)

    def operand(self, name: str) -> Operand:
        """The first operand called `name`."""
        return next(n for n in self.nodes if isinstance(n, Operand) and n.name == name)

    def operand_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that operand `name` stands for (without windows)."""
        legs = self.operand(name).legs
        return tuple(prod(self.size[axis] for axis in leg.axes) for leg in legs)

    def closed(self) -> Network:
        """The network with a vector of ones for each output axis that no node has."""
        held = set(chain.from_iterable(node.axes for node in self.nodes))
        missing = [axis for axis in dict.fromkeys(self.output_axes) if axis not in held]
        return self.rebuilt(nodes=(*self.nodes, *map(Ones, missing))) if missing else self

    def occurrences(self, axis: str) -> int:
        """How often `axis` occurs in nodes and output."""
        return sum(node.axes.count(axis) for node in self.nodes) + self.output_axes.count(axis)

    def rebuilt(
        self,
        nodes: Iterable[Node] | None = None,
        output: Iterable[Axes] | None = None,
        sizes: Mapping[str, int] | None = None,
        scale: Fraction | None = None,
    ) -> Network:
        """A network with some parts replaced; sizes of vanished axes go."""
        return Network.build(
            self.nodes if nodes is None else nodes,
            self.output if output is None else output,
            self.size | dict(sizes or {}),
            self.scale if scale is None else scale,
        )

    def renamed(self, names: Mapping[str, str]) -> Network:
        """The network with axes renamed everywhere; equal names identify axes."""
        return self.rebuilt(
            nodes=(node.renamed(names) for node in self.nodes),
            output=(rename(group, names) for group in self.output),
            sizes={names.get(axis, axis): size for axis, size in self.sizes},
        )

    def scaled(self, factor: Fraction | int) -> Network:
        """The network times `factor`."""
        return self.rebuilt(scale=self.scale * factor)

    def arranged(self, *output: Axes) -> Network:
        """The network with its output axes regrouped and reordered."""
        arranged = tuple(chain.from_iterable(output))
        assert sorted(arranged) == sorted(self.output_axes), (arranged, self.output_axes)
        return self.rebuilt(output=output)

    def jvp(self, name: str, tangent: str) -> Network:
        """The derivative along `tangent`: operand `name` replaced by operand `tangent`."""
        old = self.operand(name)
        return self.rebuilt(
            nodes=(replace(old, name=tangent) if n is old else n for n in self.nodes)
        )

    def vjp(self, name: str, cotangent: str, keep: Axes = ()) -> Network:
        """The gradient of ⟨cotangent, output⟩ with respect to operand `name`.

        The operand goes, an operand `cotangent` of the output's shape comes, and
        the operand's legs become the output. Axes in `keep` stay open in front:
        with the batch axis kept, the gradient of each example.
        """
        old = self.operand(name)
        nodes = [operand(cotangent, *self.output), *(n for n in self.nodes if n is not old)]
        return self.rebuilt(
            nodes=nodes, output=(*((a,) for a in keep), *(leg.axes for leg in old.legs))
        )

    def jacobian(self, name: str) -> Network:
        """The Jacobian with respect to operand `name`, without its identity factors.

        The operand goes and its legs stay open. An axis that only the operand and
        the output had stands for an identity factor of the Jacobian (for a
        convolution: the output channel) and is dropped; an axis that they share
        with other nodes (the channel group) stands for a diagonal and is kept once.
        """
        old = self.operand(name)
        nodes = [n for n in self.nodes if n is not old]
        present = set(chain.from_iterable(n.axes for n in nodes))
        kept = [tuple(a for a in group if a in present) for group in self.output]
        seen = set(chain.from_iterable(kept))
        opened = [tuple(a for a in leg.axes if a in present - seen) for leg in old.legs]
        return self.rebuilt(nodes=nodes, output=(group for group in kept + opened if group))

    def sum(self, *axes: str) -> Network:
        """The network summed over output axes."""
        assert set(axes) <= set(self.output_axes), (axes, self.output)
        groups = (tuple(a for a in group if a not in axes) for group in self.output)
        return self.rebuilt(output=(group for group in groups if group))

    def gram(self, rows: Axes, keep: Axes = ()) -> Network:
        """Σ T[keep, other, rows] · T[keep, other, rows'] over all other output axes.

        Output dimensions: one for each axis in `keep`, then `rows` and the primed
        `rows` as one dimension each (with one prime more than any axis has).
        """
        shared = set(self.output_axes) - set(rows)
        primes = "'" * (1 + max((axis.count("'") for axis, _ in self.sizes), default=0))
        primed = {axis: axis + primes for axis, _ in self.sizes if axis not in shared}
        copies = (node.renamed(primed) for node in self.nodes)
        return self.rebuilt(
            nodes=(*self.nodes, *copies),
            output=(*((a,) for a in keep), rows, rename(rows, primed)),
            sizes={primed[axis]: self.size[axis] for axis in primed},
            scale=self.scale**2,
        )

    def untied(self, axis: str, other: str) -> Network:
        """Write the block-diagonal of `axis` out: δ(axis, other) with `other` a new output."""
        sizes = {other: self.size[axis]}
        nodes = (*self.nodes, Delta(axis, other))
        return self.rebuilt(nodes=nodes, output=(*self.output, (other,)), sizes=sizes)

    def stacked(self, name: str, axis: str, size: int) -> Network:
        """The network for many values of operand `name`: `axis` leads operand and output."""
        old = self.operand(name)
        new = replace(old, legs=(Leg((axis,)), *old.legs))
        nodes = (new if n is old else n for n in self.nodes)
        return self.rebuilt(nodes=nodes, output=((axis,), *self.output), sizes={axis: size})

    def sampled(self, name: str, axis: str, size: int, selector: str) -> Network:
        """The network with `axis` of operand `name` reduced to `size` selected indices.

        An operand `selector` [sample, axis] says which, and how they are weighted.
        """
        old, sample = self.operand(name), f"{axis}~"
        new = old.renamed({axis: sample})
        nodes = [new if n is old else n for n in self.nodes]
        return self.rebuilt(nodes=[*nodes, operand(selector, sample, axis)], sizes={sample: size})

    def tie(self, axis: str, other: str) -> Network:
        """The diagonal in two axes of equal size: `other` takes the name of `axis`."""
        assert self.size[axis] == self.size[other], (axis, other)
        groups = (tuple(a for a in group if a != other) for group in self.output)
        untied = self.rebuilt(output=(group for group in groups if group))
        return untied.renamed({other: axis})
