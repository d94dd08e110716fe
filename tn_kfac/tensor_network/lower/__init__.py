"""Lowering: parts of a network that hardware already runs well become one node.

A lowering is a rule like those of simplification, `network -> network | None`, and keeps
the value too. It replaces nodes by a `Primitive`, whose tensor is not built from indices
but computed by a kernel; `primitives` says how. What no lowering matches is contracted
as an einsum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tn_kfac.tensor_network.lower import (
    autocorrelation,
    convolution,
    square_sum,
    strided_view,
    window_sum,
)
from tn_kfac.tensor_network.lower.autocorrelation import Autocorrelation
from tn_kfac.tensor_network.lower.convolution import ConvolutionCall
from tn_kfac.tensor_network.lower.primitive import Primitive
from tn_kfac.tensor_network.lower.square_sum import SquareSum
from tn_kfac.tensor_network.lower.window_sum import WindowSum
from tn_kfac.tensor_network.network import Network
from tn_kfac.tensor_network.simplify import traced

__all__ = [
    "PARTS",
    "WHOLE",
    "Autocorrelation",
    "ConvolutionCall",
    "Lowered",
    "Lowering",
    "Primitive",
    "SquareSum",
    "WindowSum",
    "lower",
]

Lowering = Callable[[Network], Network | None]

WHOLE: dict[str, Lowering] = {"convolution": convolution.convolution_call}
"""Lowerings of a derived network, before it is simplified."""

PARTS: dict[str, Lowering] = {
    "autocorrelation": autocorrelation.autocorrelation,
    "sum of squares": square_sum.square_sum,
    "window sum": window_sum.window_sum,
    "strided view": strided_view.strided_view,
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
