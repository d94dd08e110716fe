"""An operand under window counts becomes sums over windows: KFAC-reduce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from tn_kfac.tensor_network.lower.primitive import Primitive
from tn_kfac.tensor_network.network import Axes, Leg, Network, Operand, rename
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis


@dataclass(frozen=True)
class WindowSum(Primitive):
    """Sums of an operand over the windows of each axis; `groups` are (rows, kernels).

    `inputs` are the operand's axes that the windows cover, `spatial` their geometry.
    """

    inputs: Axes
    spatial: tuple[SpatialAxis, ...]

    @cached_property
    def shape(self) -> list[int]:
        """Of the result."""
        return [self.size[axis] for axis in self.axes]

    @property
    def flops(self) -> int:
        """One axis after the other."""
        kernels = (axis.kernel_size for axis in self.spatial)
        return 2 * self.elements(self.operands[0].axes) * sum(kernels)

    def renamed(self, names: Mapping[str, str]) -> WindowSum:
        base = super().renamed(names)
        assert isinstance(base, WindowSum)
        return replace(base, inputs=rename(self.inputs, names))


@dataclass(frozen=True)
class _Windows:
    """The windows along one leg of an operand, over which its pixels are summed."""

    axis: SpatialAxis
    input: str
    kernel: str
    pattern: Pattern | None = None


def window_sum(network: Network) -> Network | None:
    """An operand whose pixels only meet window counts is summed over windows.

    So is one that was split into tiles (o, k), with o summed. Where offsets outnumber pixels
    an einsum does less: pixels are summed and multiplied before they meet the patterns.
    """
    for node in network.nodes:
        if isinstance(node, Operand) and len(set(node.axes)) == len(node.axes):
            windows = {
                dim: found
                for dim, leg in enumerate(node.legs)
                if (found := _counted(network, leg) or _tiled(network, leg))
            }
            axes = [found.axis for found in windows.values()]
            if windows and prod(a.kernel_size for a in axes) <= prod(a.input_size for a in axes):
                beside = {at for dim in windows for at in (dim - 1, dim + 1)} - set(windows)
                for dim in sorted(beside & set(range(len(node.legs)))):
                    whole = _whole(network, node.legs[dim])
                    windows |= {} if whole is None else {dim: whole}
                return _with_window_sum(network, node, dict(sorted(windows.items())))
    return None


def _counted(network: Network, leg: Leg) -> _Windows | None:
    """A leg that nothing but a pattern of window counts has."""
    for p in network.nodes:
        if not isinstance(p, Pattern) or p.output or not p.kernel or not p.input:
            continue
        if leg == Leg((p.input,)) and network.occurrences(p.input) == 2:
            return _Windows(p.axis, p.input, p.kernel, p)
    return None


def _tiled(network: Network, leg: Leg) -> _Windows | None:
    """A leg (o, k) with o summed."""
    if leg.windows != (None,) or len(leg.axes) != 2:
        return None
    output, kernel = leg.axes
    if network.occurrences(output) > 1:
        return None
    size = network.size[kernel]
    return _Windows(
        SpatialAxis(network.size[output] * size, size, size), f"{output}×{kernel}", kernel
    )


def _whole(network: Network, leg: Leg) -> _Windows | None:
    """A leg that is summed as a whole, by windows of one pixel."""
    if leg.windows != (None,) or len(leg.axes) != 1 or network.occurrences(leg.axes[0]) > 1:
        return None
    return _Windows(SpatialAxis(network.size[leg.axes[0]], 1, 1), leg.axes[0], f"{leg.axes[0]}×1")


def _with_window_sum(network: Network, node: Operand, windows: dict[int, _Windows]) -> Network:
    legs = [Leg((windows[d].input,)) if d in windows else leg for d, leg in enumerate(node.legs)]
    pixels = Operand(node.name, tuple(legs))
    inputs = tuple(w.input for w in windows.values())
    kernels = tuple(w.kernel for w in windows.values())
    size = {w.input: w.axis.input_size for w in windows.values()}
    size |= {w.kernel: w.axis.kernel_size for w in windows.values()}
    rows = tuple(axis for axis in pixels.axes if axis not in inputs)
    summed = WindowSum(
        operands=(pixels,),
        groups=(rows, kernels),
        sizes=tuple(sorted(({axis: network.size[axis] for axis in rows} | size).items())),
        inputs=inputs,
        spatial=tuple(w.axis for w in windows.values()),
    )
    joined = [w.pattern for w in windows.values()]
    rest = [n for n in network.nodes if n is not node and not any(n is p for p in joined)]
    return network.rebuilt(nodes=[summed, *rest], sizes={k: size[k] for k in kernels})
