"""The geometry of a convolution from the shapes of whichever tensors are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from tn_kfac.expressions.operation import Shaped
from tn_kfac.tensor_network.convolution import (
    Convolution,
    Ints,
    Padding,
    convolution,
    transposed_convolution,
)


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Check a tensor's shape.

    Raises:
        ValueError: If it is not the expected one.
    """
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {tuple(shape)}, but the other arguments imply {tuple(expected)}: "
            "check sizes, stride, padding, dilation and groups"
        )


def of_pair(
    x: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    names: tuple[str, str] = ("x", "weight"),
) -> Convolution:
    """From input and weight, whose names are those of the caller's arguments."""
    _ranked(names[0], x.shape, 3)
    out_channels, _, *kernel = _ranked(names[1], weight.shape, len(x.shape))
    conv = convolution(x.shape, tuple(kernel), stride, padding, dilation, groups, out_channels)
    check_shape(names[1], weight.shape, (out_channels, conv.in_channels, *kernel))
    return conv


def of_input(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    v: Tensor | Shaped | None = None,
) -> Convolution:
    """From input and kernel size, and an output gradient if there is one."""
    out_channels = None if v is None else _ranked("v", v.shape, len(x.shape))[1]
    conv = convolution(x.shape, kernel_size, stride, padding, dilation, groups, out_channels)
    if v is not None:
        check_shape("v", v.shape, conv.network().shape)
    return conv


def of_weight(
    v: Tensor | None,
    weight: Tensor,
    input_size: Ints,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
) -> Convolution:
    """From weight and the input's spatial size, and an output gradient if there is one."""
    out_channels, channels, *kernel = _ranked("weight", weight.shape, 3)
    batch = 1 if v is None else _ranked("v", v.shape, len(weight.shape))[0]
    shape = (batch, channels * groups, *_sizes("input_size", input_size, len(kernel)))
    conv = convolution(shape, tuple(kernel), stride, padding, dilation, groups, out_channels)
    if v is not None:
        check_shape("v", v.shape, conv.network().shape)
    return conv


def of_columns(
    columns: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
) -> Convolution:
    """From unfolded columns (n, c·K, O) and the spatial size of what they fold to."""
    if len(columns.shape) != 3:
        raise ValueError(
            f"columns has shape {tuple(columns.shape)}, expected (batch, channels·K, O)"
        )
    given = (kernel_size, stride, dilation)
    lengths = [len(a) for a in (output_size, *given) if isinstance(a, Sequence)]
    sizes = _sizes("output_size", output_size, max(lengths, default=1))
    kernel = _sizes("kernel_size", kernel_size, len(sizes))
    channels, rest = divmod(columns.shape[1], prod(kernel))
    if rest:
        raise ValueError(
            f"columns has {columns.shape[1]} rows, not a multiple of the kernel's {prod(kernel)} "
            "pixels: check kernel_size"
        )
    return convolution((columns.shape[0], channels, *sizes), kernel, stride, padding, dilation)


def of_transposed_pair(
    x: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Padding,
    output_padding: Ints,
    dilation: Ints,
    groups: int,
) -> Convolution:
    """From input and weight (c, d/groups, *k) of a transposed convolution."""
    _, out_channels, *kernel = _ranked("weight", weight.shape, len(x.shape))
    conv = transposed_convolution(
        x.shape, tuple(kernel), stride, padding, output_padding, dilation, groups,
        out_channels * groups,
    )  # fmt: skip
    check_shape("weight", weight.shape, (x.shape[1], out_channels, *kernel))
    return conv


def of_transposed_input(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Padding,
    output_padding: Ints,
    dilation: Ints,
    groups: int,
    v: Tensor | Shaped | None = None,
) -> Convolution:
    """From input and kernel size of a transposed convolution, and an output gradient."""
    out_channels = None if v is None else _ranked("v", v.shape, len(x.shape))[1]
    conv = transposed_convolution(
        x.shape, kernel_size, stride, padding, output_padding, dilation, groups, out_channels
    )
    if v is not None:
        check_shape("v", v.shape, conv.network().shape)
    return conv


def of_transposed_weight(
    v: Tensor,
    weight: Tensor,
    input_size: Ints,
    stride: Ints,
    padding: Padding,
    output_padding: Ints,
    dilation: Ints,
    groups: int,
) -> Convolution:
    """From weight, output gradient and the input's spatial size of a transposed convolution."""
    channels, out_channels, *kernel = _ranked("weight", weight.shape, 3)
    batch = _ranked("v", v.shape, len(weight.shape))[0]
    shape = (batch, channels, *_sizes("input_size", input_size, len(kernel)))
    conv = transposed_convolution(
        shape, tuple(kernel), stride, padding, output_padding, dilation, groups,
        out_channels * groups,
    )  # fmt: skip
    check_shape("v", v.shape, conv.network().shape)
    return conv


def _ranked(name: str, shape: Sequence[int], rank: int) -> Sequence[int]:
    if len(shape) < 3 or len(shape) < rank:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, expected {max(rank, 3)} dimensions: two for batch "
            "or channels and one per spatial axis"
        )
    return shape


def _sizes(name: str, sizes: Ints, dims: int) -> tuple[int, ...]:
    """One size per axis; an int serves every axis."""
    entries = tuple(sizes) if isinstance(sizes, Sequence) else (sizes,) * dims
    if any(isinstance(size, bool) or not isinstance(size, int) for size in entries):
        raise TypeError(f"{name} must be made of integers, got {sizes!r}")
    if len(entries) != dims or any(size < 1 for size in entries):
        raise ValueError(f"{name}={sizes!r} must hold {dims} positive integers, one per axis")
    return entries
