"""Lowering: parts of a network that hardware already runs well become one node.

A lowering is a rule like those of simplification, `network -> network | None`, and keeps
the value too. It replaces nodes by a `Primitive`, whose tensor is not built from indices
but computed by a kernel; `primitives` says how. What no lowering matches is contracted
as an einsum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod
from typing import Literal

from tn_kfac.tensor_network.network import Axes, Leg, Network, Node, Operand, Window, rename
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis
from tn_kfac.tensor_network.simplify import traced

Kind = Literal["forward", "input_vjp", "weight_vjp"]
MAX_SPATIAL = 3
"""torch convolves over at most so many dimensions."""
MIN_CHANNELS, MIN_WINDOWS = 8, 1024
"""Fewer channels per group or windows in all do not make an autocorrelation worth it."""
MIN_ROWS, MANY_GROUPS = 64, 16
"""Many grams of fewer rows do not make a copy of all windows worth it."""
MIN_POSITIONS = 32
"""Fewer positions per example do not make a convolution of per-example gradients worth it."""


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

    @property
    def axes(self) -> Axes:
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


@dataclass(frozen=True)
class ConvolutionCall(Primitive):
    """A convolution, its input VJP or its weight VJP, of two operands.

    `roles` lists the axes of each dimension of the operands as torch wants them, `groups`
    those of the result: (outer, group, channel, spatial), for a weight (group, out, in,
    kernel).
    """

    kind: Kind
    spatial: tuple[SpatialAxis, ...]
    roles: tuple[tuple[Axes, ...], tuple[Axes, ...]]
    group_size: int

    @property
    def flops(self) -> int:
        every = self.elements(self.every_axis)
        return 2 * every // prod(axis.input_size for axis in self.spatial)

    def renamed(self, names: Mapping[str, str]) -> ConvolutionCall:
        base = super().renamed(names)
        assert isinstance(base, ConvolutionCall)
        first, second = (tuple(rename(axes, names) for axes in role) for role in self.roles)
        return replace(base, roles=(first, second))


@dataclass(frozen=True)
class WindowSum(Primitive):
    """Sums of an operand over the windows of each axis; `groups` are (rows, kernels).

    `inputs` are the operand's axes that the windows cover, `spatial` their geometry.
    """

    inputs: Axes
    spatial: tuple[SpatialAxis, ...]

    def renamed(self, names: Mapping[str, str]) -> WindowSum:
        base = super().renamed(names)
        assert isinstance(base, WindowSum)
        return replace(base, inputs=rename(self.inputs, names))


@dataclass(frozen=True)
class SquareSum(Primitive):
    """Σ x² over the operand's axes that are not in `groups` (one group)."""


@dataclass(frozen=True)
class Autocorrelation(Primitive):
    """The gram of an operand's stride-1 windows: KFAC-expand.

    `roles` are the operand's axes (summed, group, row, spatial); `groups` of the result
    are (group, row, kernel, row', kernel').
    """

    roles: tuple[Axes, ...]
    spatial: tuple[SpatialAxis, ...]

    @property
    def flops(self) -> int:
        summed, group, row, _ = self.roles
        return 2 * self.elements(summed + group) * self.elements(row) ** 2 * pair_work(self.spatial)

    def renamed(self, names: Mapping[str, str]) -> Autocorrelation:
        base = super().renamed(names)
        assert isinstance(base, Autocorrelation)
        return replace(base, roles=tuple(rename(axes, names) for axes in self.roles))


def convolution_call(network: Network) -> Network | None:
    """Two operands that full patterns join are a convolution or one of its VJPs.

    The place of a pattern's legs tells which: (input, kernel) in operands and output in
    the result is the forward pass, and so on.
    """
    operands = [n for n in network.nodes if isinstance(n, Operand)]
    patterns = [n for n in network.nodes if isinstance(n, Pattern)]
    if len(operands) != 2 or len(operands) + len(patterns) != len(network.nodes):
        return None
    if not 1 <= len(patterns) <= MAX_SPATIAL or not all(p.is_full for p in patterns):
        return None
    for first, second in (operands, operands[::-1]):
        for kind in ("forward", "input_vjp", "weight_vjp"):
            call = _call(network, kind, first, second, patterns)
            if call is not None:
                return network.rebuilt(nodes=[call]) if _fits(network, call) else None
    return None


def _fits(network: Network, call: ConvolutionCall) -> bool:
    """Whether torch's convolution beats a matrix product: always, but for per-example VJPs.

    With nothing summed over examples each one is a convolution group of its own.
    """
    if call.kind != "weight_vjp" or call.roles[0][0]:
        return True
    positions = prod(axis.output_size for axis in call.spatial)
    patterns = (isinstance(node, Pattern) for node in traced(network)[0].nodes)
    return positions >= MIN_POSITIONS and any(patterns)


def _call(
    network: Network, kind: Kind, first: Operand, second: Operand, patterns: list[Pattern]
) -> ConvolutionCall | None:
    """The call of the given kind, if the legs of all patterns are where it wants them."""
    kernels, outputs, inputs = (
        tuple(axis for p in patterns if (axis := p.legs[leg])) for leg in range(3)
    )
    legs = {
        "forward": (inputs, kernels, outputs),
        "input_vjp": (outputs, kernels, inputs),
        "weight_vjp": (inputs, outputs, kernels),
    }[kind]
    result = network.output_axes
    spatial = set(chain.from_iterable(legs))
    if len(spatial) < 3 * len(patterns) or any(
        len(set(a)) < len(a) for a in (first.axes, second.axes)
    ):
        return None
    for axes, others, leg in ((first.axes, (second.axes, result), legs[0]),
                              (second.axes, (first.axes, result), legs[1]),
                              (result, (first.axes, second.axes), legs[2])):  # fmt: skip
        if not set(leg) <= set(axes) or any(set(leg) & set(other) for other in others):
            return None
    a, b, out = (
        tuple(x for x in axes if x not in spatial) for axes in (first.axes, second.axes, result)
    )
    group = tuple(x for x in a if x in b and x in out)
    contracted = tuple(x for x in a if x in b and x not in out)
    only_a = tuple(x for x in a if x not in b and x in out)
    only_b = tuple(x for x in b if x not in a and x in out)
    if len(group + contracted + only_a) < len(a) or len(group + contracted + only_b) < len(b):
        return None
    images = {
        "forward": ((only_a, group + contracted), (group + only_b, contracted)),
        "input_vjp": ((only_a, group + contracted), (group + contracted, only_b)),
        "weight_vjp": ((contracted, group + only_a), (contracted, group + only_b)),
    }[kind]
    channels = {
        "forward": (only_a, group, only_b),
        "input_vjp": (only_a, group, only_b),
        "weight_vjp": (group, only_b, only_a),
    }[kind]
    roles = tuple(
        (*image, *((axis,) for axis in leg)) for image, leg in zip(images, legs, strict=False)
    )
    return ConvolutionCall(
        operands=(first, second),
        groups=(*channels, legs[2]),
        sizes=network.sizes,
        kind=kind,
        spatial=tuple(p.axis for p in patterns),
        roles=(roles[0], roles[1]),
        group_size=prod(network.size[axis] for axis in group),
    )


def window_sum(network: Network) -> Network | None:
    """An operand whose pixels only meet window counts is summed over windows."""
    counts = [n for n in network.nodes if isinstance(n, Pattern) and _counts_windows(n)]
    for node in network.nodes:
        if not isinstance(node, Operand) or len(set(node.axes)) < len(node.axes):
            continue
        joined = [p for p in counts if p.input in node.axes and network.occurrences(p.input) == 2]
        if joined:
            return _with_window_sum(network, node, joined)
    return None


def _counts_windows(pattern: Pattern) -> bool:
    return pattern.output is None and None not in (pattern.kernel, pattern.input)


def _with_window_sum(network: Network, node: Operand, joined: list[Pattern]) -> Network:
    inputs = tuple(p.input for p in joined if p.input)
    kernels = tuple(p.kernel for p in joined if p.kernel)
    rows = tuple(axis for axis in node.axes if axis not in inputs)
    summed = WindowSum(
        (node,),
        (rows, kernels),
        _sizes(network, node, kernels),
        inputs,
        tuple(p.axis for p in joined),
    )
    rest = [n for n in network.nodes if n is not node and not any(n is p for p in joined)]
    return network.rebuilt(nodes=[summed, *rest])


def _sizes(network: Network, node: Operand, more: Axes = ()) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((axis, network.size[axis]) for axis in {*node.axes, *more}))


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

    An open window axis means that the windows are the result.
    """
    if pattern.output in network.output_axes:
        return True
    others = (n.axes for n in network.nodes if isinstance(n, Operand) and n is not holder)
    shared = set(chain.from_iterable(others))
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
                nodes=[SquareSum((node,), (kept,), _sizes(network, node)), *rest]
            )
    return None


def autocorrelation(network: Network) -> Network | None:
    """Two copies of an operand whose stride-1 windows meet at every position."""
    operands = [n for n in network.nodes if isinstance(n, Operand)]
    patterns = [n for n in network.nodes if isinstance(n, Pattern)]
    if len(operands) != 2 or len(operands) + len(patterns) != len(network.nodes):
        return None
    first, second = operands
    twins = dict(zip(first.axes, second.axes, strict=False))
    if first.renamed(twins) != second or len(set(first.axes)) < len(first.axes):
        return None
    pairs = _twin_patterns(patterns, twins, network)
    if pairs is None or not 1 <= len(pairs) <= MAX_SPATIAL:
        return None
    call = _autocorrelation(network, first, twins, pairs)
    return network.rebuilt(nodes=[call]) if call and _pays(call) else None


def _twin_patterns(
    patterns: list[Pattern], twins: Mapping[str, str], network: Network
) -> list[tuple[Pattern, Pattern]] | None:
    """The patterns in pairs that differ in the operand's copy alone and share windows."""
    pairs = []
    left = [p for p in patterns if p.is_full and p.input and twins.get(p.input, p.input) != p.input]
    for one in left:
        twin = twins.get(one.input or "")
        partner = [p for p in patterns if p is not one and p.input == twin]
        if len(partner) != 1 or one.axis.stride != 1:
            return None
        other = partner[0]
        alike = one.axis == other.axis and one.output == other.output and one.kernel != other.kernel
        if not alike or network.occurrences(one.output or "") != 2:
            return None
        pairs.append((one, other))
    return pairs if 2 * len(pairs) == len(patterns) else None


def _autocorrelation(
    network: Network, node: Operand, twins: Mapping[str, str], pairs: list[tuple[Pattern, Pattern]]
) -> Autocorrelation | None:
    spatial = tuple(one.input for one, _ in pairs if one.input)
    kernels = tuple(one.kernel for one, _ in pairs if one.kernel)
    primed = tuple(other.kernel for _, other in pairs if other.kernel)
    others = [axis for axis in node.axes if axis not in spatial]
    out = network.output_axes
    group = tuple(a for a in others if twins[a] == a and a in out)
    summed = tuple(a for a in others if twins[a] == a and a not in out)
    row = tuple(a for a in others if twins[a] != a)
    groups = (group, row, kernels, rename(row, twins), primed)
    if set(chain(*groups)) != set(out) or len(tuple(chain(*groups))) != len(out):
        return None
    return Autocorrelation(
        operands=(node,),
        groups=groups,
        sizes=network.sizes,
        roles=(summed, group, row, spatial),
        spatial=tuple(one.axis for one, _ in pairs),
    )


def pair_work(spatial: Sequence[SpatialAxis]) -> int:
    """Products per pair of rows: all offsets between pixels, and the border's windows."""
    pixels = prod(axis.input_size for axis in spatial)
    offsets = prod(2 * axis.kernel_size - 1 for axis in spatial)
    border = 0
    for axis in spatial:
        others = [a for a in spatial if a is not axis]
        windows = prod(a.input_size + a.reach - 1 for a in others)
        met = (len(axis.met_offsets(w)) for w in axis.uncounted_windows())
        border += windows * prod(a.kernel_size**2 for a in others) * sum(m * m for m in met)
    return offsets * pixels + border


def _pays(call: Autocorrelation) -> bool:
    """Whether the offsets cost less than the windows, and convolutions run well.

    They do not with few channels per group; and with few windows in all the work is in
    arranging the factor, not in forming it (both measured, benchmarks/layer.py).
    """
    summed, _, row, _ = call.roles
    windows = call.elements(summed) * prod(axis.output_size for axis in call.spatial)
    products = prod(axis.output_size * axis.kernel_size**2 for axis in call.spatial)
    cheap = 2 * pair_work(call.spatial) < products
    return cheap and call.elements(row) >= MIN_CHANNELS and windows >= MIN_WINDOWS


Lowering = Callable[[Network], Network | None]

WHOLE: dict[str, Lowering] = {"convolution": convolution_call}
"""Lowerings of a derived network, before it is simplified."""

PARTS: dict[str, Lowering] = {
    "autocorrelation": autocorrelation,
    "sum of squares": square_sum,
    "window sum": window_sum,
    "strided view": strided_view,
}
"""Lowerings of a simplified network, applied while one matches."""


@dataclass(frozen=True)
class Lowered:
    """A network ready to be planned, and the names of what led to it."""

    network: Network
    rules: tuple[str, ...]
    lowerings: tuple[str, ...]


def lower(network: Network, lowerings: Iterable[str] | None = None) -> Lowered:
    """Simplify a network and replace what a kernel can compute.

    `lowerings` names those to use; all if None.
    """
    allowed = {**WHOLE, **PARTS} if lowerings is None else dict.fromkeys(lowerings)
    for name, lowering in WHOLE.items():
        lowered = lowering(network) if name in allowed else None
        if lowered is not None:
            return Lowered(lowered, (), (name,))
    network, rules = traced(network)
    used: list[str] = []
    while True:
        for name, lowering in PARTS.items():
            lowered = lowering(network) if name in allowed else None
            if lowered is not None:
                network = lowered
                used.append(name)
                break
        else:
            return Lowered(network, rules, tuple(used))
