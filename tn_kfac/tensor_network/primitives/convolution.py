"""Convolutions and their VJPs by torch, with padding that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from tn_kfac.tensor_network.lower import ConvolutionCall
from tn_kfac.tensor_network.pattern import SpatialAxis
from tn_kfac.tensor_network.primitives.arrange import Materialise, Sizes, arranged

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolve(
    node: ConvolutionCall, sizes: Sizes, tensor_of: Materialise, dtype: torch.dtype
) -> Tensor:
    """The result of a convolution call, with one dimension per axis of the node."""
    first, second = (
        arranged(tensor_of(operand).to(dtype), operand.axes, roles)
        for operand, roles in zip(node.operands, node.roles, strict=True)
    )
    return KINDS[node.kind](node, first, second).reshape([sizes[axis] for axis in node.axes])


def _paddings(spatial: Sequence[SpatialAxis]) -> list[tuple[int, int]]:
    """Pixels to add on the left and, until the last window ends, on the right."""
    return [
        (a.padding[0], (a.output_size - 1) * a.stride + a.reach - a.input_size - a.padding[0])
        for a in spatial
    ]


def _symmetric(spatial: Sequence[SpatialAxis]) -> list[int] | None:
    """The padding that gives just the wanted windows, if it is the same on both sides."""
    padding = [a.padding[0] for a in spatial]
    windows = [(a.input_size + 2 * a.padding[0] - a.reach) // a.stride + 1 for a in spatial]
    return padding if windows == [a.output_size for a in spatial] else None


def _padded(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """The spatial dimensions with zeros added on both sides; negative widths crop.

    Zeros come first, so that one side may crop all that the other has added.
    """
    added = [(max(left, 0), max(right, 0)) for left, right in widths]
    x = F.pad(x, list(chain.from_iterable(reversed(added))))
    for dim, (left, right) in enumerate(widths):
        start, end = max(-left, 0), max(-right, 0)
        x = x.narrow(2 + dim, start, x.shape[2 + dim] - start - end)
    return x


def _strides(node: ConvolutionCall) -> tuple[list[int], list[int]]:
    return [a.stride for a in node.spatial], [a.dilation for a in node.spatial]


def _forward(node: ConvolutionCall, x: Tensor, weight: Tensor) -> Tensor:
    stride, dilation = _strides(node)
    padding = _symmetric(node.spatial)
    if padding is None:
        x, padding = _padded(x, _paddings(node.spatial)), [0] * len(stride)
    call = CONVOLUTIONS[len(stride)]
    return call(x, weight, None, stride, padding, dilation, node.group_size)


def _input_vjp(node: ConvolutionCall, v: Tensor, weight: Tensor) -> Tensor:
    shape = [a.input_size for a in node.spatial]
    widths = None if _symmetric(node.spatial) else _paddings(node.spatial)
    if widths:
        shape = [n + left + right for n, (left, right) in zip(shape, widths, strict=True)]
    channels = weight.shape[1] * node.group_size
    like = v.new_empty(1).expand(v.shape[0], channels, *shape)
    gradient = _backward(node, v, like, weight, widths is not None, 0)
    if widths is None:
        return gradient
    return _padded(gradient, [(-left, -right) for left, right in widths])


def _weight_vjp(node: ConvolutionCall, x: Tensor, v: Tensor) -> Tensor:
    padded = _symmetric(node.spatial) is None
    if padded:
        x = _padded(x, _paddings(node.spatial))
    kernel = [a.kernel_size for a in node.spatial]
    like = x.new_empty(1).expand(v.shape[1], x.shape[1] // node.group_size, *kernel)
    return _backward(node, v, x, like, padded, 1)


def _backward(
    node: ConvolutionCall, v: Tensor, x: Tensor, weight: Tensor, padded: bool, which: int
) -> Tensor:
    """torch's own backward pass of a convolution, for the input (0) or the weight (1)."""
    stride, dilation = _strides(node)
    padding = [0] * len(stride) if padded else [a.padding[0] for a in node.spatial]
    zeros = [0] * len(stride)
    mask = [which == 0, which == 1, False]
    gradients = torch.ops.aten.convolution_backward.default(
        v, x, weight, None, stride, padding, dilation, False, zeros, node.group_size, mask
    )
    return gradients[which]


KINDS = {"forward": _forward, "input_vjp": _input_vjp, "weight_vjp": _weight_vjp}
