"""The pattern-pair identity, on which the autocorrelation of KFAC-expand is built.

It is no rule of the fixed point, for an einsum gains nothing from it: the lowering matches the
pair of patterns, and its kernel forms the right-hand side.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from tn_kfac.tensor_network.network import Network
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis


def pattern_pair(network: Network) -> Network | None:
    """Two patterns that only share their windows depend on the offset δ = k' − k alone.

    Σ_o Π[k, o, i] Π[k', o, j] = S[k, i] · Σ_δ [j = i + δ·dilation] [k' = k + δ],

    where S counts windows. Exact for every stride.
    """
    patterns = [n for n in network.nodes if isinstance(n, Pattern) and n.is_full]
    for first, second in combinations(patterns, 2):
        shared = set(first.axes) & set(second.axes)
        alike = first.axis == second.axis and first.output == second.output
        if alike and len(shared) == 1 and network.occurrences(shared.pop()) == 2:
            return _paired(network, first, second)
    return None


def _paired(network: Network, first: Pattern, second: Pattern) -> Network:
    axis, reach = first.axis, first.axis.kernel_size - 1
    offsets, delta = 2 * reach + 1, f"{first.kernel}−{second.kernel}"
    margin = (reach * axis.dilation, reach * axis.dilation)
    pixels = SpatialAxis(axis.input_size, offsets, 1, margin, axis.dilation)
    kernels = SpatialAxis(axis.kernel_size, offsets, 1, (reach, reach))
    paired = (
        replace(first, output=None),
        Pattern(pixels, delta, first.input, second.input),
        Pattern(kernels, delta, first.kernel, second.kernel),
    )
    rest = (n for n in network.nodes if n is not first and n is not second)
    return network.rebuilt(nodes=(*rest, *paired), sizes={delta: offsets})
