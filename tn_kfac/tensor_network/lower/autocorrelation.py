"""The gram of an operand's windows becomes its autocorrelation: KFAC-expand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

from tn_kfac.tensor_network.lower.convolution import MAX_SPATIAL
from tn_kfac.tensor_network.lower.primitive import Primitive
from tn_kfac.tensor_network.network import Axes, Network, Operand, rename
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis

MIN_WINDOWS = 1024
"""Fewer windows in all do not make an autocorrelation worth it."""
FEW_CHANNELS, MIN_IMAGE = 4, 1024
"""Up to so many channels per group are correlated by Fourier transforms, which are not worth
it for images of fewer windows."""


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
    """Whether the offsets cost less than the windows, or than products of all pixels.

    With few windows in all the work is in arranging the factor, not in forming it; all
    constants are measured (benchmarks/layer.py).
    """
    summed, _, row, _ = call.roles
    image = prod(axis.output_size for axis in call.spatial)
    if call.elements(row) <= FEW_CHANNELS and image < MIN_IMAGE:
        return False
    products = prod(
        min(axis.output_size * axis.kernel_size**2, axis.input_size**2) for axis in call.spatial
    )
    cheap = 2 * pair_work(call.spatial) < products
    return cheap and call.elements(summed) * image >= MIN_WINDOWS
