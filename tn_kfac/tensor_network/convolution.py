"""Hyper-parameters of a convolution, checked once, and its tensor network.

    y[n, (g d), o…] = Σ_{c, k…, i…} x[n, (g c), i…] · Π_axes Π[k, o, i] · w[(g d), c, k…]

(https://arxiv.org/abs/2307.02275, Section 3). Everything else about a convolution
is derived from this network. A transposed convolution is the same network with the
roles of o and i exchanged: its input lives on the windows, its output on the pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import TypeAlias

from tn_kfac.tensor_network.network import Axes, Network, operand
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis
from tn_kfac.tensor_network.rows import Rows

Ints: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int] | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Convolution:
    """A (transposed) convolution of given shapes: channel counts are per group."""

    batch: int
    groups: int
    in_channels: int
    out_channels: int
    spatial: tuple[SpatialAxis, ...]
    transposed: bool = False

    def names(self, letter: str) -> Axes:
        """One axis name per spatial dimension: k1, k2, … for the letter k."""
        return tuple(f"{letter}{dim + 1}" for dim in range(len(self.spatial)))

    @property
    def kernels(self) -> Axes:
        """The axes of the kernel."""
        return self.names("k")

    @property
    def inputs(self) -> Axes:
        """The spatial axes of the input."""
        return self.names("o" if self.transposed else "i")

    @property
    def outputs(self) -> Axes:
        """The spatial axes of the output."""
        return self.names("i" if self.transposed else "o")

    @property
    def output_size(self) -> tuple[int, ...]:
        """The spatial size of the output."""
        return tuple(
            axis.input_size if self.transposed else axis.output_size for axis in self.spatial
        )

    def network(self) -> Network:
        """The forward pass, of operands `x` and `weight`."""
        k, o, i = self.kernels, self.names("o"), self.names("i")
        weight = (("g", "c"), "d") if self.transposed else (("g", "d"), "c")
        nodes = [
            operand("x", "n", ("g", "c"), *self.inputs),
            *starmap(Pattern, zip(self.spatial, k, o, i, strict=True)),
            operand("weight", *weight, *k),
        ]
        sizes = {"n": self.batch, "g": self.groups, "c": self.in_channels, "d": self.out_channels}
        for axis, *names in zip(self.spatial, k, o, i, strict=True):
            sizes |= dict(zip(names, axis.extents, strict=True))
        output = (("n",), ("g", "d"), *((axis,) for axis in self.outputs))
        return Network.build(nodes, output, sizes)

    def rows(self) -> Rows:
        """The rows that multiply the weight matrix: the unfolded input, [n, o…, g, (c k…)]."""
        features = ("c", *self.kernels)
        shared = ((axis,) for axis in self.outputs)
        jacobian = self.network().jacobian("weight").arranged(("n",), *shared, ("g",), features)
        return Rows(jacobian, ("n",), self.outputs, ("g",), features)


def convolution(
    input_shape: Sequence[int],
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    out_channels: int | None = None,
) -> Convolution:
    """Check the hyper-parameters of a convolution and bind them to an input's shape.

    Args:
        input_shape: (batch, channels, *spatial).
        kernel_size: Pixels per spatial axis; an int serves every axis.
        stride: Pixels between windows.
        padding: Pixels on both sides, (left, right) pairs, "same" or "valid".
        dilation: Pixels between kernel elements.
        groups: Number of channel groups.
        out_channels: Of all groups together; one per group if not given.

    Raises:
        ValueError: If a value is impossible; the message names argument and remedy.
        TypeError: If a value is not made of integers.
    """
    batch, channels, *spatial_shape = _checked_shape("x", input_shape)
    kernel, strides, paddings, dilations = _spatial(
        len(spatial_shape), kernel_size, stride, padding, dilation
    )
    out_channels = groups if out_channels is None else out_channels
    _check_groups(channels, out_channels, groups)
    axes = tuple(
        SpatialAxis(*axis)
        for axis in zip(spatial_shape, kernel, strides, paddings, dilations, strict=True)
    )
    for dim, axis in enumerate(axes):
        if axis.output_size < 1:
            raise ValueError(
                f"kernel_size {axis.kernel_size} with dilation {axis.dilation} reaches over "
                f"{axis.reach} pixels, more than the {axis.input_size + sum(axis.padding)} padded "
                f"pixels of spatial dimension {dim}: use a larger input, more padding or a "
                "smaller kernel"
            )
    return Convolution(batch, groups, channels // groups, out_channels // groups, axes)


def transposed_convolution(
    input_shape: Sequence[int],
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    out_channels: int | None = None,
) -> Convolution:
    """Check the hyper-parameters of a transposed convolution and bind them to an input.

    Arguments as in `convolution`; `padding` crops the output, `output_padding` extends it
    on the right.

    Raises:
        ValueError: If a value is impossible; the message names argument and remedy.
        TypeError: If a value is not made of integers.
    """
    batch, channels, *spatial_shape = _checked_shape("x", input_shape)
    dims = len(spatial_shape)
    kernel, strides, paddings, dilations = _spatial(dims, kernel_size, stride, padding, dilation)
    extras = _per_axis("output_padding", output_padding, dims, 0)
    out_channels = groups if out_channels is None else out_channels
    _check_groups(channels, out_channels, groups)
    axes = []
    for size, k, s, p, extra, d in zip(
        spatial_shape, kernel, strides, paddings, extras, dilations, strict=True
    ):
        if extra >= max(s, d):
            raise ValueError(
                f"output_padding={extra} must be smaller than stride ({s}) or dilation ({d})"
            )
        pixels = (size - 1) * s + d * (k - 1) + 1 + extra - sum(p)
        if pixels < 1:
            raise ValueError(
                f"padding {p} leaves no pixel of the output of size {pixels + sum(p)}: use less "
                "padding or a larger input"
            )
        axes.append(SpatialAxis(pixels, k, s, p, d, outputs=size))
    channels_out = out_channels // groups
    return Convolution(batch, groups, channels // groups, channels_out, tuple(axes), True)


def _checked_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) < 3:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; expected (batch, channels, *spatial) with at "
            "least one spatial dimension: add the missing dimensions, e.g. by unsqueeze"
        )
    return tuple(shape)


def _spatial(
    dims: int, kernel_size: Ints, stride: Ints, padding: Padding, dilation: Ints
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Kernel size, stride, padding and dilation, each with one entry per axis."""
    kernel = _per_axis("kernel_size", kernel_size, dims, 1)
    strides = _per_axis("stride", stride, dims, 1)
    dilations = _per_axis("dilation", dilation, dims, 1)
    return kernel, strides, _paddings(padding, kernel, strides, dilations), dilations


def _check_groups(in_channels: int, out_channels: int, groups: int) -> None:
    require_int("groups", groups, 1)
    for name, channels in (("input", in_channels), ("output", out_channels)):
        if channels % groups:
            raise ValueError(
                f"groups={groups} does not divide the {channels} {name} channels: choose a "
                "divisor of both channel counts"
            )


def require_int(name: str, value: object, least: int) -> int:
    """The value, which must be an integer of at least `least`.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be made of integers, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def _per_axis(name: str, value: Ints, dims: int, least: int) -> tuple[int, ...]:
    """An int for all axes, or one int per axis."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be an integer or a sequence of integers, got {value!r}")
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise ValueError(
            f"{name}={value!r} has {len(values)} entries for {dims} spatial dimensions: give one "
            "integer, or one per dimension"
        )
    return tuple(require_int(name, entry, least) for entry in values)


def _paddings(
    padding: Padding, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """The (left, right) padding of each axis; "same" puts an odd pixel on the right."""
    dims = len(kernel)
    if padding == "valid":
        return ((0, 0),) * dims
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(
                f"padding='same' needs stride 1, got stride {stride}: give the padding in pixels"
            )
        totals = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(
            f"padding={padding!r} is unknown: use 'same', 'valid', an integer, one integer per "
            "dimension, or (left, right) pairs"
        )
    if isinstance(padding, Sequence) and any(isinstance(p, Sequence) for p in padding):
        pairs = [p for p in padding if isinstance(p, Sequence) and len(p) == 2]
        if len(pairs) != len(padding) or len(pairs) not in (1, dims):
            raise ValueError(
                f"padding={padding!r} must hold one (left, right) pair for each of the {dims} "
                "spatial dimensions"
            )
        left, right = (tuple(require_int("padding", p[side], 0) for p in pairs) for side in (0, 1))
        return tuple(zip(left, right, strict=True)) * (dims if len(pairs) == 1 else 1)
    return tuple((p, p) for p in _per_axis("padding", padding, dims, 0))  # type: ignore[arg-type]
