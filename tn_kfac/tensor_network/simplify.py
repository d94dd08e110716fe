"""Simplification: pure rules `network -> network | None`, run to a fixed point.

Each rule keeps the value of the network and returns None where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import chain, combinations, pairwise

from tn_kfac.tensor_network.network import (
    Axes,
    Delta,
    Leg,
    Network,
    Node,
    Operand,
    Window,
    substitute,
)
from tn_kfac.tensor_network.pattern import Pattern

Rule = Callable[[Network], Network | None]


def delta(network: Network) -> Network | None:
    """δ(a, b) contracts away: b takes the name a, unless both are outputs.

    An axis that nothing else has is then summed over ones: its size is a factor.
    """
    for node in network.nodes:
        if not isinstance(node, Delta):
            continue
        kept, gone = node.axes
        if kept != gone and gone in network.output_axes:
            kept, gone = gone, kept
        if kept == gone or gone not in network.output_axes:
            rest = network.rebuilt(nodes=(n for n in network.nodes if n is not node))
            named = {kept, gone} & rest.size.keys()
            return rest.renamed({gone: kept}) if named else rest.scaled(network.size[kept])
    return None


def dense(network: Network) -> Network | None:
    """Windows that tile their axis are a reshape: of an operand's leg i, or of an output.

    With kernel = stride, no padding and no dilation, pixel i = o·K + k is the product (o k).
    A single window (o = 0) has any stride.
    """
    return _without_pattern(network, tiling=True)


def down_sampling(network: Network) -> Network | None:
    """Windows that neither overlap nor tile are a strided view of an operand's leg i.

    Without padding and with stride ≥ reach, i = o·stride + k·dilation names each pixel at
    most once.
    """
    return _without_pattern(network, tiling=False)


def _without_pattern(network: Network, tiling: bool) -> Network | None:
    """The network without its first pattern of disjoint windows that tile (or do not)."""
    for node in network.nodes:
        if isinstance(node, Pattern) and node.is_full and _disjoint(node):
            rewritten = _unfold(network, node) if _tiles(node) == tiling else None
            if rewritten is not None:
                return rewritten
    return None


def _disjoint(pattern: Pattern) -> bool:
    axis = pattern.axis
    apart = axis.stride >= axis.reach or axis.output_size == 1
    return axis.padding[0] == 0 and apart and not _overhangs(pattern)


def _overhangs(pattern: Pattern) -> bool:
    """Whether the last window reaches into padding on the right."""
    axis = pattern.axis
    return (axis.output_size - 1) * axis.stride + axis.reach > axis.input_size


def _tiles(pattern: Pattern) -> bool:
    axis = pattern.axis
    covered = axis.output_size * axis.kernel_size
    dense = axis.kernel_size == 1 or axis.dilation == 1
    step = axis.stride == axis.kernel_size or axis.output_size == 1
    return dense and step and covered == axis.input_size


def _unfold(network: Network, pattern: Pattern) -> Network | None:
    kernel, output, input = pattern.legs
    assert kernel and output and input
    if network.occurrences(input) != 2:
        return None
    rest = [n for n in network.nodes if n is not pattern]
    if input in network.output_axes:
        if not _tiles(pattern) or {kernel, output} & set(network.output_axes):
            return None
        groups = (substitute(group, input, (output, kernel)) for group in network.output)
        return network.rebuilt(nodes=rest, output=groups)
    holder = next((n for n in rest if input in n.axes), None)
    if not isinstance(holder, Operand):
        return None
    leg = next(leg for leg in holder.legs if input in leg.axes)
    viewed = _viewed(leg, pattern)
    if viewed is None:
        return None
    legs = tuple(viewed if other is leg else other for other in holder.legs)
    split = Operand(holder.name, legs)
    return network.rebuilt(nodes=(split if n is holder else n for n in rest))


def _viewed(leg: Leg, pattern: Pattern) -> Leg | None:
    """The leg with its input axis read through the windows of `pattern`."""
    kernel, output, input = pattern.legs
    assert kernel and output and input
    if _tiles(pattern):
        return leg.substituted(input, (output, kernel))
    if leg != Leg((input,)):
        return None
    axis = pattern.axis
    window = Window(axis.output_size, axis.stride, axis.kernel_size, axis.dilation)
    return Leg((output, kernel), (window,))


def collapse(network: Network) -> Network | None:
    """Two equal patterns that share two legs are one: Π[k,o,i] Π[k,o,j] = Π[k,o,i] δ(i,j).

    Holds because two indices of a pattern determine the third.
    """
    patterns = [n for n in network.nodes if isinstance(n, Pattern) and n.is_full]
    for first, second in combinations(patterns, 2):
        if first.axis != second.axis:
            continue
        differing = [(a, b) for a, b in zip(first.legs, second.legs, strict=True) if a != b]
        if len(differing) <= 1:
            rest = [n for n in network.nodes if n is not second]
            deltas = [Delta(a, b) for a, b in differing if a and b]
            return network.rebuilt(nodes=rest + deltas)
    return None


def summed_pattern(network: Network) -> Network | None:
    """A leg that only a pattern has is summed inside it: Σ_o Π[k,o,i] counts windows."""
    for node in network.nodes:
        if isinstance(node, Pattern):
            for axis in node.axes:
                if network.occurrences(axis) == 1:
                    return _replaced(network, node, node.summed(axis))
    return None


def _replaced(network: Network, node: Node, pattern: Pattern) -> Network:
    """The network with `node` replaced; a pattern without legs is a number."""
    if pattern.axes:
        return network.rebuilt(nodes=(pattern if n is node else n for n in network.nodes))
    rest = (n for n in network.nodes if n is not node)
    return network.rebuilt(nodes=rest, scale=network.scale * pattern.count())


def squeeze(network: Network) -> Network | None:
    """Axes of size one go; a pattern that loses its last leg becomes a number."""
    for axis, size in network.sizes:
        if size == 1:
            return _squeezed(network, axis)
    return None


def _squeezed(network: Network, axis: str) -> Network:
    scale, nodes = network.scale, []
    for node in network.nodes:
        if axis not in node.axes:
            nodes.append(node)
        elif isinstance(node, Operand):
            legs = tuple(leg.substituted(axis, ()) for leg in node.legs)
            nodes.append(Operand(node.name, legs))
        elif isinstance(node, Pattern):
            pattern = node.summed(axis)
            if pattern.axes:
                nodes.append(pattern)
            else:
                scale *= pattern.count()
    groups = (substitute(group, axis, ()) for group in network.output)
    return network.rebuilt(nodes=nodes, output=groups, scale=scale)


def merge(network: Network) -> Network | None:
    """Two axes that are neighbours wherever they occur become one."""
    for node in network.nodes:
        if isinstance(node, Operand):
            for pair in pairwise(node.axes):
                if pair[0] != pair[1] and _always_neighbours(network, pair):
                    return _merged(network, pair)
    return None


def _always_neighbours(network: Network, pair: tuple[str, str]) -> bool:
    if not all(isinstance(n, Operand) for n in network.nodes if set(pair) & set(n.axes)):
        return False
    operands = (n for n in network.nodes if isinstance(n, Operand))
    viewed = (leg.axes for n in operands for leg in n.legs if any(leg.windows))
    if set(pair) & set(chain.from_iterable(viewed)):
        return False  # a strided view: merging would copy it
    places = [n.axes for n in network.nodes] + list(network.output)
    return all(_neighbours(axes, pair) for axes in places)


def _neighbours(axes: Axes, pair: tuple[str, str]) -> bool:
    """Whether each occurrence of either axis is one of the two side by side."""
    first, second = pair
    at = [index for index, axis in enumerate(axes) if axis == first]
    return axes.count(second) == len(at) and all(axes[i + 1 : i + 2] == (second,) for i in at)


def _merged(network: Network, pair: tuple[str, str]) -> Network:
    first, second = pair
    name = f"{first}·{second}"
    nodes = (
        Operand(n.name, _merge_legs(n.legs, pair, name)) if isinstance(n, Operand) else n
        for n in network.nodes
    )
    groups = (_merge_axes(group, pair, name) for group in network.output)
    size = network.size[first] * network.size[second]
    return network.rebuilt(nodes=nodes, output=groups, sizes={name: size})


def _merge_axes(axes: Axes, pair: tuple[str, str], name: str) -> Axes:
    first, second = pair
    return tuple(name if axis == first else axis for axis in axes if axis != second)


def _merge_legs(legs: tuple[Leg, ...], pair: tuple[str, str], name: str) -> tuple[Leg, ...]:
    """The legs with the pair as one axis; legs that it spans become one leg."""
    joined: list[Leg] = []
    for leg in legs:
        if joined and joined[-1].axes[-1:] == (pair[0],):
            last = joined.pop()
            leg = Leg(last.axes + leg.axes, last.windows + leg.windows)
        joined.append(leg)
    return tuple(replace(leg, axes=_merge_axes(leg.axes, pair, name)) for leg in joined)


RULES: dict[str, Rule] = {
    "delta": delta,
    "dense": dense,
    "down-sampling": down_sampling,
    "pattern collapse": collapse,
    "summed pattern": summed_pattern,
    "squeeze": squeeze,
    "merge": merge,
}


def traced(network: Network) -> tuple[Network, tuple[str, ...]]:
    """The fixed point of all rules, and the names of the rules that led there."""
    used: list[str] = []
    while True:
        for name, rule in RULES.items():
            rewritten = rule(network)
            if rewritten is not None:
                network = rewritten
                used.append(name)
                break
        else:
            return network, tuple(used)


@lru_cache(maxsize=4096)
def simplify(network: Network) -> Network:
    """The fixed point of all rules."""
    return traced(network)[0]
