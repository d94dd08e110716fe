"""Hyper-parameters of a convolution, checked once, and its tensor network.

    y[n, (g d), o…] = Σ_{c, k…, i…} x[n, (g c), i…] · Π_axes Π[k, o, i] · w[(g d), c, k…]

(https://arxiv.org/abs/2307.02275, Section 3). Everything else about a convolution
is derived from this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tn_kfac.tensor_network.network import Axes, Network, operand
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis

Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Convolution:
    """A convolution of given shapes: channel counts are per group."""

    batch: int
    groups: int
    in_channels: int
    out_channels: int
    spatial: tuple[SpatialAxis, ...]

    def names(self, letter: str) -> Axes:
        """One axis name per spatial dimension: k1, k2, … for the letter k."""
        return tuple(f"{letter}{dim + 1}" for dim in range(len(self.spatial)))

    @property
    def output_size(self) -> tuple[int, ...]:
        """The spatial size of the output."""
        return tuple(axis.output_size for axis in self.spatial)

    def network(self) -> Network:
        """The forward pass, of operands `x` and `weight`."""
        k, o, i = self.names("k"), self.names("o"), self.names("i")
        legs = zip(self.spatial, k, o, i, strict=True)
        nodes = [
            operand("x", "n", ("g", "c"), *i),
            *(Pattern(*leg) for leg in legs),
            operand("weight", ("g", "d"), "c", *k),
        ]
        sizes = {"n": self.batch, "g": self.groups, "c": self.in_channels, "d": self.out_channels}
        for axis, *names in zip(self.spatial, k, o, i, strict=True):
            sizes |= dict(zip(names, (axis.kernel_size, axis.output_size, axis.input_size)))
        return Network.build(nodes, (("n",), ("g", "d"), *((axis,) for axis in o)), sizes)

    def unfolded_input(self) -> Network:
        """The rows that multiply the weight matrix: [n, o…, g, (c k…)]."""
        jacobian = self.network().jacobian("weight")
        o = ((axis,) for axis in self.names("o"))
        return jacobian.arranged(("n",), *o, ("g",), ("c", *self.names("k")))


def convolution(
    input_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
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
    if len(input_shape) < 3:
        raise ValueError(
            f"x has shape {tuple(input_shape)}; expected (batch, channels, *spatial) with at "
            "least one spatial dimension: add the missing dimensions, e.g. by unsqueeze"
        )
    batch, channels, *spatial_shape = input_shape
    dims = len(spatial_shape)
    kernel = _per_axis("kernel_size", kernel_size, dims, 1)
    strides = _per_axis("stride", stride, dims, 1)
    dilations = _per_axis("dilation", dilation, dims, 1)
    paddings = _paddings(padding, kernel, strides, dilations)
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


def _check_groups(in_channels: int, out_channels: int, groups: int) -> None:
    _require_int("groups", groups, 1)
    for name, channels in (("input", in_channels), ("output", out_channels)):
        if channels % groups:
            raise ValueError(
                f"groups={groups} does not divide the {channels} {name} channels: choose a "
                "divisor of both channel counts"
            )


def _require_int(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be made of integers, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def _per_axis(name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
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
    return tuple(_require_int(name, entry, least) for entry in values)


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
        pairs = tuple(padding) * (dims if len(padding) == 1 else 1)
        if len(pairs) != dims or any(not isinstance(p, Sequence) or len(p) != 2 for p in pairs):
            raise ValueError(
                f"padding={padding!r} must hold one (left, right) pair for each of the {dims} "
                "spatial dimensions"
            )
        left, right = (tuple(_require_int("padding", p[side], 0) for p in pairs) for side in (0, 1))
        return tuple(zip(left, right, strict=True))
    return tuple((p, p) for p in _per_axis("padding", padding, dims, 0))  # type: ignore[arg-type]
