"""Hypothesis strategies: networks of any nodes, and those that convolutions lead to.

Tensors hold small integers, so that equal values are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import prod

import torch
from expressions import strategies as convolutions
from hypothesis import strategies as st
from torch import Tensor

from tn_kfac.tensor_network.convolution import Convolution, convolution
from tn_kfac.tensor_network.network import (
    Axes,
    Delta,
    Leg,
    Network,
    Node,
    Operand,
    Window,
)
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis


@dataclass(frozen=True)
class Drawn:
    """A network and tensors for its operands."""

    network: Network
    tensors: dict[str, Tensor] = field(hash=False, repr=False)


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers, as float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).double()


def tensors_of(network: Network) -> dict[str, Tensor]:
    """A tensor for each operand."""
    operands = {node.name: node for node in network.nodes if isinstance(node, Operand)}
    return {
        name: integers(*_shape(node, network.size), seed=len(name) + number)
        for number, (name, node) in enumerate(sorted(operands.items()))
    }


def _shape(node: Operand, size: dict[str, int]) -> list[int]:
    """The smallest shape that the legs fit."""
    shape = []
    for leg in node.legs:
        (window,) = leg.windows
        pixels = prod(size[axis] for axis in leg.axes)
        if window is not None:
            pixels = (window.outputs - 1) * window.stride + (window.kernels - 1) * window.dilation
            pixels += 2  # one more than needed
        shape.append(pixels)
    return shape


@st.composite
def spatial_axes(draw: st.DrawFn) -> SpatialAxis:
    """One spatial axis, sometimes with fewer windows than fit."""
    axis = draw(convolutions.axes(2))
    full = SpatialAxis(axis.input, axis.kernel, axis.stride, axis.padding, axis.dilation)
    if draw(st.booleans()):
        return full
    return replace(full, outputs=draw(st.integers(1, full.output_size)))


class _Pool:
    """The axes drawn so far."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.sizes: dict[str, int] = {}

    def new(self, size: int) -> str:
        name = "abcdefghijklmnopqrstuvwxyz"[len(self.sizes)]
        self.sizes[name] = size
        return name

    def of_size(self, size: int) -> str:
        """An axis of that size: a new one or, a hyper-edge, one that others have too."""
        known = [axis for axis, other in self.sizes.items() if other == size]
        return self.draw(st.sampled_from([*known, ""])) or self.new(size)

    def any(self, least: int, most: int) -> list[str]:
        return self.draw(st.lists(st.sampled_from(list(self.sizes)), min_size=least, max_size=most))


@st.composite
def networks(draw: st.DrawFn) -> Drawn:
    """Operands, deltas and patterns; axes may be hyper-edges, or occur twice in a node."""
    pool = _Pool(draw)
    for size in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)):
        pool.new(size)
    nodes: list[Node] = []
    for axis in draw(st.lists(spatial_axes(), max_size=2)):
        legs = [draw(st.integers(0, 6)) and pool.of_size(extent) for extent in axis.extents]
        nodes.append(Pattern(axis, *(leg or None for leg in legs)))
    patterns = [node for node in nodes if isinstance(node, Pattern)]
    if patterns and draw(st.booleans()):
        nodes.append(_twin(pool, draw(st.sampled_from(patterns))))
    for left in pool.any(0, 2):
        nodes.append(Delta(left, pool.of_size(pool.sizes[left])))
    for name in draw(st.sampled_from(["x", "xy", "xyz"])):
        nodes.append(Operand(name, tuple(_legs(pool))))
    if draw(st.booleans()):
        operand = nodes[-1]
        axes = dict.fromkeys(operand.axes)
        nodes.append(operand.renamed({axis: pool.of_size(pool.sizes[axis]) for axis in axes}))
    nodes = draw(st.permutations(nodes))
    present = list(dict.fromkeys(axis for node in nodes for axis in node.axes))
    output = draw(st.lists(st.sampled_from(present), unique=True, max_size=5)) if present else []
    scale = Fraction(draw(st.sampled_from([1, 3, -2])), draw(st.sampled_from([1, 4])))
    network = Network.build(nodes, _grouped(draw, output), pool.sizes, scale)
    return Drawn(network, tensors_of(network))


def _twin(pool: _Pool, pattern: Pattern) -> Pattern:
    """The same pattern with some of its legs moved to other axes."""
    legs = []
    for leg, extent in zip(pattern.legs, pattern.axis.extents, strict=True):
        keep = leg is None or pool.draw(st.integers(0, 2))
        legs.append(leg if keep else pool.of_size(extent))
    return Pattern(pattern.axis, *legs)


def _grouped(draw: st.DrawFn, axes: list[str]) -> list[Axes]:
    """The axes, each in its own group or in that of its neighbour."""
    groups: list[Axes] = []
    for axis in axes:
        if groups and draw(st.booleans()):
            groups[-1] += (axis,)
        else:
            groups.append((axis,))
    return groups


def _legs(pool: _Pool) -> list[Leg]:
    legs = [Leg(axes) for axes in _grouped(pool.draw, pool.any(0, 4))]
    if pool.draw(st.integers(0, 4)) == 0:
        (output, kernel), stride = pool.any(2, 2), pool.draw(st.integers(1, 3))
        dilation = pool.draw(st.integers(1, 2))
        window = Window(pool.sizes[output], stride, pool.sizes[kernel], dilation)
        at = pool.draw(st.integers(0, len(legs)))
        legs.insert(at, Leg((output, kernel), (window,)))
    return legs


def bound(cases: st.SearchStrategy[convolutions.Case]) -> st.SearchStrategy[Convolution]:
    """The library's convolutions of drawn cases."""
    return cases.map(
        lambda case: convolution(
            (case.batch, case.in_channels, *case.input_size),
            case.kernel_size,
            out_channels=case.out_channels,
            **case.hyper,
        )
    )


def forwards(dims: int) -> st.SearchStrategy[Convolution]:
    """Convolutions of up to `dims` dimensions."""
    return bound(convolutions.cases(st.integers(1, dims)))


@st.composite
def derived(draw: st.DrawFn, dims: int = 2) -> Drawn:
    """A convolution's network with a few operators applied: derivatives, sums, grams, ties."""
    network = draw(forwards(dims)).network()
    for _ in range(draw(st.integers(0, 3))):
        after = draw(st.sampled_from(OPERATORS))(draw, network)
        if len(set(after.output_axes)) == len(after.output_axes):  # else not a network
            network = after
    return Drawn(network, tensors_of(network))


def _operands(network: Network) -> list[str]:
    return sorted({node.name for node in network.nodes if isinstance(node, Operand)})


def _subset(draw: st.DrawFn, axes: Axes) -> Axes:
    return tuple(draw(st.lists(st.sampled_from(axes), unique=True))) if axes else ()


def _jacobian(draw: st.DrawFn, network: Network) -> Network:
    names = _operands(network)
    return network.jacobian(draw(st.sampled_from(names))) if len(names) > 1 else network


def _vjp(draw: st.DrawFn, network: Network) -> Network:
    names = _operands(network)
    if "v" in names:
        return network
    return network.vjp(draw(st.sampled_from(names)), "v", keep=())


def _jvp(draw: st.DrawFn, network: Network) -> Network:
    name = draw(st.sampled_from(_operands(network)))
    return network.jvp(name, f"{name} tangent")


def _sum(draw: st.DrawFn, network: Network) -> Network:
    return network.sum(*_subset(draw, network.output_axes))


def _gram(draw: st.DrawFn, network: Network) -> Network:
    if len(network.nodes) > 5 or any("'" in axis for axis, _ in network.sizes):
        return network
    rows = _subset(draw, network.output_axes)
    shared = tuple(axis for axis in network.output_axes if axis not in rows)
    return network.gram(rows, keep=_subset(draw, shared))


def _tie(draw: st.DrawFn, network: Network) -> Network:
    size = network.size
    pairs = [
        (axis, other)
        for axis in network.output_axes
        for other in network.output_axes
        if axis < other and size[axis] == size[other]
    ]
    return network.tie(*draw(st.sampled_from(pairs))) if pairs else network


OPERATORS: tuple[Callable[[st.DrawFn, Network], Network], ...] = (
    _jacobian,
    _vjp,
    _jvp,
    _sum,
    _gram,
    _tie,
)
