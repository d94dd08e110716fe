"""Hypothesis strategies: convolutions of any dimension with all their hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

MODES = ("pixels", "pixels", "pixels", "same", "valid")
ANY = st.sampled_from([1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6])
# By dimension: the largest kernel size, dilation, stride, padding, and spare input pixels.
LIMITS = {
    1: (5, 3, 6, 4, 6),
    2: (3, 2, 4, 2, 3),
    3: (2, 2, 3, 1, 2),
    4: (2, 1, 2, 1, 1),
    5: (2, 1, 2, 1, 0),
    6: (2, 1, 2, 1, 0),
}
WINDOWS = {1: 3, 2: 3, 3: 2, 4: 2, 5: 1, 6: 1}  # the most in one axis, where they are few


def examples(factor: float) -> settings:
    """So many times the number of cases that the loaded profile asks for."""
    return settings(max_examples=max(1, int(factor * settings().max_examples)))


@dataclass(frozen=True)
class Axis:
    """One spatial axis."""

    input: int
    kernel: int
    stride: int
    padding: tuple[int, int]
    dilation: int


@dataclass(frozen=True)
class Case:
    """A convolution: shapes, and hyper-parameters in one of the forms that torch accepts."""

    batch: int
    groups: int
    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        dims = len(self.input_size)
        return (self.kernel_size,) * dims if isinstance(self.kernel_size, int) else self.kernel_size

    @property
    def hyper(self) -> dict[str, Any]:
        """Everything but the kernel size."""
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def features(self) -> int:
        """The size of one group's factor."""
        return self.in_channels // self.groups * prod(self.kernel_shape)

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return _random(0, dtype, self.batch, self.in_channels, *self.input_size)

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        channels = self.in_channels // self.groups
        return _random(1, dtype, self.out_channels, channels, *self.kernel_shape)

    def v(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor of the output's shape."""
        return _random(2, dtype, self.batch, self.out_channels, *self.output_size)


@dataclass(frozen=True)
class TransposedCase(Case):
    """A transposed convolution; its weight is (in_channels, out_channels/groups, *kernel)."""

    output_padding: Any = 0

    @property
    def hyper(self) -> dict[str, Any]:
        return super().hyper | {"output_padding": self.output_padding}

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        channels = self.out_channels // self.groups
        return _random(1, dtype, self.in_channels, channels, *self.kernel_shape)


def _random(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@st.composite
def general(draw: st.DrawFn, dims: int) -> Axis:
    """Any stride, also over the kernel's reach, any padding, also beyond the kernel."""
    kernels, dilations, strides, paddings, spare = LIMITS[dims]
    kernel, dilation = draw(st.integers(1, kernels)), draw(st.integers(1, dilations))
    padding = draw(st.tuples(st.integers(0, paddings), st.integers(0, paddings)))
    least = max(1, dilation * (kernel - 1) + 1 - sum(padding))
    size = draw(st.integers(least, least + spare))
    return Axis(size, kernel, draw(st.integers(1, strides)), padding, dilation)


@st.composite
def dense(draw: st.DrawFn, dims: int) -> Axis:
    """Windows side by side, perhaps with pixels left over."""
    kernel = draw(st.integers(1, LIMITS[dims][0]))
    windows = draw(st.integers(1, WINDOWS[dims]))
    left_over = draw(st.sampled_from([0, 0, kernel - 1]))
    return Axis(windows * kernel + left_over, kernel, kernel, (0, 0), 1)


@st.composite
def down_sampling(draw: st.DrawFn, dims: int) -> Axis:
    """Pixels between the windows that no window meets."""
    kernels, dilations, *_ = LIMITS[dims]
    kernel, dilation = draw(st.integers(1, kernels)), draw(st.integers(1, dilations))
    reach = dilation * (kernel - 1) + 1
    stride = reach + draw(st.integers(0, 2 if dims < 3 else 1))
    windows = draw(st.integers(1, WINDOWS[dims]))
    left_over = draw(st.integers(0, min(2, stride - 1) if dims < 4 else 0))
    size = (windows - 1) * stride + reach + left_over
    return Axis(size, kernel, stride, (0, 0), dilation)


@st.composite
def overhanging(draw: st.DrawFn, dims: int) -> Axis:
    """A kernel larger than the input, but not than the padded input."""
    kernels, dilations, strides, _, _ = LIMITS[dims]
    kernel, dilation = draw(st.integers(2, max(2, kernels))), draw(st.integers(1, dilations))
    reach = dilation * (kernel - 1) + 1
    size = draw(st.integers(1, min(reach - 1, 3)))
    left = draw(st.integers(0, reach - size))
    right = reach - size - left + draw(st.integers(0, 1))
    return Axis(size, kernel, draw(st.integers(1, strides)), (left, right), dilation)


@st.composite
def sparse(draw: st.DrawFn, dims: int) -> Axis:
    """A stride over the whole input, so that windows meet a few pixels of it, or padding only."""
    size, kernel = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    most = max(1, LIMITS[dims][3])
    padding = (draw(st.integers(kernel - 1, most)), draw(st.integers(0, most)))
    return Axis(size, kernel, size + draw(st.sampled_from([0, padding[0]])), padding, 1)


def axes(dims: int) -> st.SearchStrategy[Axis]:
    kinds = (general, dense, down_sampling, overhanging, sparse)
    return st.one_of(kind(dims) for kind in kinds)


@st.composite
def cases(
    draw: st.DrawFn,
    dims: st.SearchStrategy[int] = ANY,
    axis: Callable[[int], st.SearchStrategy[Axis]] = axes,
    modes: Sequence[str] = MODES,
) -> Case:
    """Any convolution; its hyper-parameters written in any form.

    `axis` draws a spatial axis, given the number of dimensions.
    """
    number, mode = draw(dims), draw(st.sampled_from(modes))
    spatial = _alike(draw, [_in_mode(draw(axis(number)), mode) for _ in range(number)])
    return Case(
        **_channels(draw, number),
        **_written_out(draw, spatial, mode),
        input_size=tuple(axis.input for axis in spatial),
        output_size=tuple(_windows(axis) for axis in spatial),
    )


@st.composite
def transposed_cases(draw: st.DrawFn, dims: st.SearchStrategy[int] = ANY) -> TransposedCase:
    """Any transposed convolution: the input has a pixel for each window of the output.

    Of the output, at least one pixel must be left after cropping by the padding.
    """
    number, mode = draw(dims), draw(st.sampled_from(MODES))
    spatial = _alike(draw, [_in_mode(draw(axes(number)), mode) for _ in range(number)])
    extra = [draw(st.integers(0, max(axis.stride, axis.dilation) - 1)) for axis in spatial]
    if len(set(spatial)) == 1:
        extra = extra[:1] * number
    inputs = [max(_windows(axis), _least_windows(axis)) for axis in spatial]
    return TransposedCase(
        **_channels(draw, number),
        **_written_out(draw, spatial, mode),
        input_size=tuple(inputs),
        output_size=tuple(
            (pixels - 1) * axis.stride + _reach(axis) + more - sum(axis.padding)
            for pixels, axis, more in zip(inputs, spatial, extra, strict=True)
        ),
        output_padding=_written(draw, tuple(extra)),
    )


def _alike(draw: st.DrawFn, spatial: list[Axis]) -> list[Axis]:
    """Perhaps with all axes alike, so that one int can stand for them."""
    return spatial[:1] * len(spatial) if draw(st.booleans()) else spatial


def _channels(draw: st.DrawFn, dims: int) -> dict[str, int]:
    small = dims < 4
    groups = draw(st.sampled_from([1, 1, 2, 3] if small else [1, 2]))
    channels = st.integers(1, 2 if small else 1).map(lambda count: groups * count)
    batch = draw(st.integers(1, 3 if small else 2))
    counts = {"in_channels": draw(channels), "out_channels": draw(channels)}
    return {"batch": batch, "groups": groups, **counts}


def _written_out(draw: st.DrawFn, spatial: list[Axis], mode: str) -> dict[str, Any]:
    pairs = tuple(axis.padding for axis in spatial)
    return {
        "kernel_size": _written(draw, tuple(axis.kernel for axis in spatial)),
        "stride": _written(draw, tuple(axis.stride for axis in spatial)),
        "padding": mode if mode != "pixels" else _written_pairs(draw, pairs),
        "dilation": _written(draw, tuple(axis.dilation for axis in spatial)),
    }


def _reach(axis: Axis) -> int:
    return axis.dilation * (axis.kernel - 1) + 1


def _least_windows(axis: Axis) -> int:
    """So many windows that they reach over one pixel more than the padding."""
    missing = sum(axis.padding) + 1 - _reach(axis)
    return 1 + max(0, -(-missing // axis.stride))


def _in_mode(axis: Axis, mode: str) -> Axis:
    reach = _reach(axis)
    if mode == "same":
        return Axis(axis.input, axis.kernel, 1, ((reach - 1) // 2, reach // 2), axis.dilation)
    if mode == "valid":
        size = max(axis.input, reach)
        return Axis(size, axis.kernel, axis.stride, (0, 0), axis.dilation)
    return axis


def _windows(axis: Axis) -> int:
    return len(range(0, axis.input + sum(axis.padding) - _reach(axis) + 1, axis.stride))


def _written(draw: st.DrawFn, values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 and draw(st.booleans()) else values


def _written_pairs(draw: st.DrawFn, pairs: tuple[tuple[int, int], ...]) -> Any:
    """Pairs as they are, or without the pairs where left and right agree."""
    if any(left != right for left, right in pairs) or draw(st.booleans()):
        return pairs
    return _written(draw, tuple(left for left, _ in pairs))
