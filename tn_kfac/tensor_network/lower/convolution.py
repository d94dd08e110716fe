"""Two operands that full patterns join become one of torch's convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Literal

from tn_kfac.tensor_network.lower.primitive import Primitive
from tn_kfac.tensor_network.network import Axes, Network, Operand, rename
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis
from tn_kfac.tensor_network.simplify import traced

Kind = Literal["forward", "input_vjp", "weight_vjp"]
MAX_SPATIAL = 3
"""torch convolves over at most so many dimensions."""
MIN_POSITIONS = 300
"""Fewer positions per example do not make a convolution of per-example gradients worth it."""
FEW_POSITIONS, MANY_WEIGHTS, WIDENING = 32, 1 << 18, 6
"""A matrix product of fewer positions, more weights, or so many times more outputs than inputs
is better done as such."""
FEW_SAMPLES, SMALL_GROUPS = 2048, 1 << 18
"""The weight VJP (or a product) of fewer positions, over all examples, is a small matrix product;
so is that of single channels of single examples with fewer pixels."""
SMALL_IMAGE, MANY_CHANNELS = 64, 384
"""Up to so many positions of so many channels, the patterns cost next to nothing."""
SMALL_RESULT = 1 << 18
"""Up to so many entries, patterns place what a kernel of one pixel makes faster than torch does."""


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
    """Whether torch's convolution beats an einsum (all measured, benchmarks/layer.py).

    It does not if there is one window, nor for single channels under kernels as large as the
    image, nor for few positions of very many channels. If nothing is left of the patterns,
    which makes a matrix product of it, only the forward pass of not too many channels wins.
    Without a sum over examples each one is a group of its own, which suits many positions, or
    single channels.
    """
    positions = prod(axis.output_size for axis in call.spatial)
    channels, out = _channels(call)
    samples = call.elements(call.roles[0][0]) * positions
    if positions == 1:
        return False
    if not any(isinstance(node, Pattern) for node in traced(network)[0].nodes):
        wide = channels * out > MANY_WEIGHTS or out >= WIDENING * channels
        few = positions < FEW_POSITIONS or samples < FEW_SAMPLES
        return call.kind == "forward" and not few and not wide
    small = call.kind == "input_vjp" and call.elements(call.axes) <= SMALL_RESULT
    if small and all(axis.kernel_size == 1 for axis in call.spatial):
        return False
    if positions <= SMALL_IMAGE and min(channels, out) >= MANY_CHANNELS:
        return False
    per_example = call.kind == "weight_vjp" and not call.roles[0][0]
    if call.kind == "weight_vjp" and not per_example and samples < FEW_SAMPLES:
        return False
    if channels == 1:
        small = per_example and call.group_size * positions < SMALL_GROUPS
        return not small and any(axis.kernel_size < axis.input_size - 1 for axis in call.spatial)
    grouped = sum(call.size[axis] > 1 for axis in call.groups[0]) > 1
    return not per_example or (positions >= MIN_POSITIONS and not grouped)


def _channels(call: ConvolutionCall) -> tuple[int, int]:
    """The input and output channels of a group."""
    contracted = call.roles[1][0 if call.kind == "input_vjp" else 1]
    inner = call.elements(contracted) // (call.group_size if call.kind == "input_vjp" else 1)
    own = call.elements(call.groups[2])
    return {
        "forward": (inner, own),
        "input_vjp": (own, inner),
        "weight_vjp": (own, call.elements(call.groups[1])),
    }[call.kind]


def _call(
    network: Network, kind: Kind, first: Operand, second: Operand, patterns: list[Pattern]
) -> ConvolutionCall | None:
    """The call of the given kind, if the legs of all patterns are where it wants them."""
    legs = _legs(kind, patterns)
    holders = (first.axes, second.axes, network.output_axes)
    spatial = set(chain.from_iterable(legs))
    if len(spatial) < 3 * len(patterns) or not _in_place(legs, holders):
        return None
    a, b, out = (tuple(x for x in axes if x not in spatial) for axes in holders)
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


def _legs(kind: Kind, patterns: list[Pattern]) -> tuple[Axes, Axes, Axes]:
    """The legs that the first operand, the second and the result have to hold."""
    kernels, outputs, inputs = (
        tuple(axis for p in patterns if (axis := p.legs[leg])) for leg in range(3)
    )
    return {
        "forward": (inputs, kernels, outputs),
        "input_vjp": (outputs, kernels, inputs),
        "weight_vjp": (inputs, outputs, kernels),
    }[kind]


def _in_place(legs: tuple[Axes, ...], holders: tuple[Axes, Axes, Axes]) -> bool:
    """Whether each of operands and result holds its legs alone, and no operand an axis twice."""
    if any(len(set(axes)) < len(axes) for axes in holders[:2]):
        return False
    for at, leg in enumerate(legs):
        others = chain(*holders[:at], *holders[at + 1 :])
        if not set(leg) <= set(holders[at]) or set(leg) & set(others):
            return False
    return True
