"""An operand under window counts becomes sums over windows: KFAC-reduce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tn_kfac.tensor_network.lower.primitive import Primitive, sizes_of
from tn_kfac.tensor_network.network import Axes, Network, Operand, rename
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis


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
        sizes_of(network, node, kernels),
        inputs,
        tuple(p.axis for p in joined),
    )
    rest = [n for n in network.nodes if n is not node and not any(n is p for p in joined)]
    return network.rebuilt(nodes=[summed, *rest])
