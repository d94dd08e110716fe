"""Slicing: a contraction in parts along one axis, so that no intermediate is too large.

An axis that only operands have (the batch, a channel group) may be cut anywhere: the
parts are added if the axis is summed, and concatenated if it is open. The result is
exact. Nothing as large as an unfolded input is ever allocated by default.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TypeAlias

from tn_kfac.tensor_network.network import Axes, Network, Operand
from tn_kfac.tensor_network.plan import Plan, plan_whole

DEFAULT_LIMIT = 1 << 24
"""Elements of the largest intermediate, unless the caller says otherwise (64 MiB in float32)."""


@dataclass(frozen=True)
class Cut:
    """Where the sliced axis leads a dimension: `inner` elements per index."""

    dim: int
    inner: int


@dataclass(frozen=True)
class Sliced:
    """A plan for slices of `chunk` indices of one axis, and one for what remains.

    `operands` says where the axis is in each operand that has it, `output` where it is in
    the result; None adds the parts.
    """

    size: int
    chunk: int
    operands: tuple[tuple[str, Cut], ...]
    output: Cut | None
    part: AnyPlan
    rest: AnyPlan | None

    @property
    def owns_result(self) -> bool:
        """Whether the result is new, not a view of an operand."""
        return self.part.owns_result

    @property
    def lowerings(self) -> tuple[str, ...]:
        """Names of what kernels compute."""
        return self.part.lowerings

    @property
    def peak(self) -> int:
        """Elements of the largest intermediate."""
        return self.part.peak

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return self.part.flops * (self.size // self.chunk) + (self.rest.flops if self.rest else 0)

    @property
    def traffic(self) -> int:
        """Elements read and written."""
        rest = self.rest.traffic if self.rest else 0
        return self.part.traffic * (self.size // self.chunk) + rest


AnyPlan: TypeAlias = Plan | Sliced


@lru_cache(maxsize=4096)
def plan(
    network: Network,
    simplified: bool = True,
    lowered: bool = True,
    memory_limit: int = DEFAULT_LIMIT,
) -> AnyPlan:
    """The plan of a network, sliced until no intermediate exceeds a limit.

    Args:
        network: What to contract.
        simplified: Whether to simplify it first.
        lowered: Whether kernels may compute parts of a simplified network.
        memory_limit: Elements of the largest value between operands and result (at least
            as many as the result has). Where no slicing can keep it, the plan with the
            least is taken.
    """
    whole = plan_whole(network, simplified, lowered)
    best: AnyPlan = whole
    memory_limit = max(memory_limit, prod(network.shape))
    if best.peak <= memory_limit:
        return best
    for axis in _sliceable(network, summed_first=whole.copies_windows):
        size = network.size[axis]
        chunk = max(1, size * memory_limit // best.peak)
        if chunk >= size:
            continue
        sliced = _sliced(network, axis, chunk, (simplified, lowered, memory_limit))
        if sliced.peak < best.peak:
            best = sliced
        if best.peak <= memory_limit:
            break
    return best


def _sliced(network: Network, axis: str, chunk: int, options: tuple[bool, bool, int]) -> Sliced:
    size = network.size[axis]
    remainder = size % chunk
    rest = plan(network.rebuilt(sizes={axis: remainder}), *options) if remainder else None
    cuts = {
        node.name: _cut(tuple(leg.axes for leg in node.legs), axis, network)
        for node in network.nodes
        if isinstance(node, Operand) and axis in node.axes
    }
    return Sliced(
        size=size,
        chunk=chunk,
        operands=tuple((name, cut) for name, cut in cuts.items()),
        output=_cut(network.output, axis, network) if axis in network.output_axes else None,
        part=plan(network.rebuilt(sizes={axis: chunk}), *options),
        rest=rest,
    )


def _cut(groups: tuple[Axes, ...], axis: str, network: Network) -> Cut:
    dim = next(at for at, group in enumerate(groups) if axis in group)
    return Cut(dim, prod(network.size[a] for a in groups[dim][1:]))


def _sliceable(network: Network, summed_first: bool) -> list[str]:
    """Axes that may be cut, the largest first.

    Copies of windows are cheaper for all groups at once, so then summed axes come first;
    products with patterns are not (both measured on a GPU).
    """
    return sorted(
        (axis for axis, size in network.sizes if size > 1 and _may_cut(network, axis)),
        key=lambda axis: (summed_first and axis in network.output_axes, -network.size[axis]),
    )


def _may_cut(network: Network, axis: str) -> bool:
    """Whether the axis leads the same dimension of all copies of an operand, and nothing else.

    In the output it must lead a dimension, or be summed.
    """
    places: dict[str, set[int | None]] = {}
    for node in network.nodes:
        if not isinstance(node, Operand):
            if axis in node.axes:
                return False
            continue
        if any(axis in leg.axes and leg.windows != (None,) for leg in node.legs):
            return False  # the dimension has pixels, or more than one
        leads = [dim for dim, leg in enumerate(node.legs) if leg.axes[:1] == (axis,)]
        if node.axes.count(axis) != len(leads) or len(leads) > 1:
            return False
        places.setdefault(node.name, set()).add(leads[0] if leads else None)
    if any(len(dims) > 1 for dims in places.values()):
        return False
    leading = sum(group[:1] == (axis,) for group in network.output)
    return network.output_axes.count(axis) == leading <= 1
