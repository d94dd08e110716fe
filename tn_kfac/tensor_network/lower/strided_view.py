"""A pattern that only one operand meets becomes a strided view: no primitive, no kernel."""

from __future__ import annotations

from itertools import chain
from math import prod

from tn_kfac.tensor_network.network import Leg, Network, Operand, Window
from tn_kfac.tensor_network.pattern import Pattern

MIN_ROWS, MANY_GROUPS = 64, 16
"""Many grams of fewer rows do not make a copy of all windows worth it (all measured)."""
SMALL_SIDE, SMALL_OPERAND = 64, 1 << 20
"""Pixels on a side, and entries of the operand, up to which products with patterns are cheaper
than a copy of windows."""


def strided_view(network: Network) -> Network | None:
    """Windows of an operand that is the only one to have the pixels are a strided view."""
    for pattern in network.nodes:
        if isinstance(pattern, Pattern) and pattern.is_full and pattern.input:
            holder = _sole_holder(network, pattern.input)
            if holder is not None and _view_pays(network, pattern, holder):
                axis = pattern.axis
                end = (axis.output_size - 1) * axis.stride + axis.reach
                padding = (axis.padding[0], max(0, end - axis.padding[0] - axis.input_size))
                window = Window(
                    axis.output_size, axis.stride, axis.kernel_size, axis.dilation, padding
                )
                assert pattern.output and pattern.kernel
                viewed = Leg((pattern.output, pattern.kernel), (window,))
                legs = (viewed if leg.axes == (pattern.input,) else leg for leg in holder.legs)
                view = Operand(holder.name, tuple(legs))
                rest = (n for n in network.nodes if n is not pattern)
                return network.rebuilt(nodes=(view if n is holder else n for n in rest))
    return None


def _view_pays(network: Network, pattern: Pattern, holder: Operand) -> bool:
    """Whether to copy windows for a matrix product: not for many groups of few rows each.

    Nor for an image that is small enough for products with its patterns to cost less than a
    copy of overlapping windows. An open window axis means that the windows are the result: they
    are copied, unless lines have fewer pixels than windows have offsets.
    """
    axis, patterns = pattern.axis, [n for n in network.nodes if isinstance(n, Pattern)]
    others = (n.axes for n in network.nodes if isinstance(n, Operand) and n is not holder)
    shared = set(chain.from_iterable(others))
    few = axis.stride == 1 or prod(network.size[a] for a in holder.axes) <= SMALL_OPERAND
    if len(patterns) > 1 and shared and few and axis.input_size <= SMALL_SIDE:
        return False
    if pattern.output in network.output_axes:
        return axis.kernel_size <= axis.input_size
    if len(patterns) == 2 and 2 * axis.input_size**2 < axis.output_size * axis.kernel_size**2:
        return False  # a gram of pixels, from which both patterns pick, is cheaper
    open_axes = set(network.output_axes)
    own = {p.kernel for p in network.nodes if isinstance(p, Pattern) and p.input in holder.axes}
    rows = (set(holder.axes) & open_axes) - shared | own
    groups = set(holder.axes) & open_axes & shared
    row_count, group_count = (prod(network.size[a] for a in axes if a) for axes in (rows, groups))
    return row_count >= MIN_ROWS or group_count < MANY_GROUPS


def _sole_holder(network: Network, axis: str) -> Operand | None:
    """The operand that alone has the axis, as a dimension of its own."""
    if network.occurrences(axis) != 2:
        return None
    for node in network.nodes:
        if isinstance(node, Operand) and Leg((axis,)) in node.legs:
            return node
    return None
