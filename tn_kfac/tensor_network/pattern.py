"""Index patterns: how one spatial axis of a convolution connects its three indices.

    Π[k, o, i] = 1  if  i = o·stride + k·dilation − padding,  else 0

Two of the three indices determine the third. A pattern is a handful of integers
until an einsum really needs its tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tn_kfac.tensor_network.network import Axes, Node


@dataclass(frozen=True)
class SpatialAxis:
    """Hyper-parameters of one spatial axis; `padding` is (left, right), in pixels.

    `outputs` is the number of windows, if it is less than those that fit.
    """

    input_size: int
    kernel_size: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    outputs: int | None = None

    @property
    def extents(self) -> tuple[int, int, int]:
        """Sizes of the legs (kernel, output, input)."""
        return (self.kernel_size, self.output_size, self.input_size)

    @property
    def reach(self) -> int:
        """Pixels from the first to the last that one window touches."""
        return self.dilation * (self.kernel_size - 1) + 1

    @property
    def output_size(self) -> int:
        """Number of windows (not positive if the kernel does not fit)."""
        if self.outputs is not None:
            return self.outputs
        return (self.input_size + sum(self.padding) - self.reach) // self.stride + 1

    def met_offsets(self, window: int) -> range:
        """The offsets k at which a window (of any index) meets a pixel."""
        first = window * self.stride - self.padding[0]
        low = max(0, -(first // self.dilation))
        high = (self.input_size - 1 - first) // self.dilation + 1
        return range(low, max(low, min(high, self.kernel_size)))

    def uncounted_windows(self) -> list[int]:
        """Windows before the first and after the last counted one that meet a pixel."""
        before = range((self.padding[0] - self.reach) // self.stride + 1, 0)
        end = (self.input_size - 1 + self.padding[0]) // self.stride + 1
        return [*before, *range(self.output_size, end)]


@dataclass(frozen=True)
class Pattern(Node):
    """The index pattern of a spatial axis. A leg that is None has been summed over."""

    axis: SpatialAxis
    kernel: str | None
    output: str | None
    input: str | None

    @property
    def legs(self) -> tuple[str | None, str | None, str | None]:
        """The legs (kernel, output, input)."""
        return (self.kernel, self.output, self.input)

    @property
    def axes(self) -> Axes:
        return tuple(leg for leg in self.legs if leg is not None)

    @cached_property
    def anonymous(self) -> Pattern:
        """The pattern with numbers as names: equal ones have equal tensors."""
        return self.renamed({axis: str(i) for i, axis in enumerate(self.axes)})

    @property
    def is_full(self) -> bool:
        """Whether no leg has been summed over, nor identified with another."""
        return None not in self.legs and len(set(self.legs)) == 3

    def renamed(self, names: Mapping[str, str]) -> Pattern:
        kernel, output, input = (leg and names.get(leg, leg) for leg in self.legs)
        return Pattern(self.axis, kernel, output, input)

    def summed(self, axis: str) -> Pattern:
        """The pattern summed over the leg called `axis`."""
        kernel, output, input = (None if leg == axis else leg for leg in self.legs)
        return replace(self, kernel=kernel, output=output, input=input)

    def count(self) -> int:
        """The sum of all entries: how many (window, offset) pairs meet a real pixel."""
        a = self.axis
        outputs = range(a.output_size)
        return sum(
            len(_within(range(-a.padding[0] + k * a.dilation, a.input_size, a.stride), outputs))
            for k in range(a.kernel_size)
        )


def _within(positions: range, outputs: range) -> range:
    """The part of `positions` (one per output) that is a pixel: not negative."""
    taken = positions[: len(outputs)]
    skipped = 0 if not taken or taken.start >= 0 else -(taken.start // taken.step)
    return taken[skipped:]
