"""How primitives are computed: torch's convolutions and matrix products, or our kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from tn_kfac.kernels.window_sum import window_sum
from tn_kfac.tensor_network.lower import (
    Autocorrelation,
    ConvolutionCall,
    Primitive,
    SquareSum,
    WindowSum,
)
from tn_kfac.tensor_network.network import Axes, Operand
from tn_kfac.tensor_network.pattern import SpatialAxis

Sizes = Mapping[str, int]
Materialise = Callable[[Operand], Tensor]

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SQUARE_CHUNK = 1 << 20
"""Elements that are squared at a time on a CPU, where a norm is slow."""
CORRELATION_PARTS, CORRELATION_LEAST = 4, 1 << 21
"""A correlation is taken in so many parts of the batch, but of no fewer elements each:
cuDNN's workspace grows with a part, and small parts are slow."""


def arranged(tensor: Tensor, axes: Axes, roles: Sequence[Axes], sizes: Sizes) -> Tensor:
    """A tensor of the given axes with one dimension per role."""
    order = list(chain.from_iterable(roles))
    permuted = tensor.permute([axes.index(axis) for axis in order])
    return permuted.reshape([prod(sizes[a] for a in role) for role in roles])


def convolve(node: ConvolutionCall, sizes: Sizes, tensor_of: Materialise) -> Tensor:
    """The result of a convolution call, with one dimension per axis of the node."""
    first, second = (
        arranged(tensor_of(operand), operand.axes, roles, sizes)
        for operand, roles in zip(node.operands, node.roles, strict=True)
    )
    compute = {"forward": _forward, "input_vjp": _input_vjp, "weight_vjp": _weight_vjp}[node.kind]
    return compute(node, first, second).reshape([sizes[axis] for axis in node.axes])


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
    gradients = torch.ops.aten.convolution_backward(
        v, x, weight, None, stride, padding, dilation, False, zeros, node.group_size, mask
    )
    return gradients[which]


def sum_windows(node: WindowSum, sizes: Sizes, tensor_of: Materialise) -> Tensor:
    """The window sums of an operand, with one dimension per axis of the node."""
    (operand,), (rows, _) = node.operands, node.groups
    singles = tuple((axis,) for axis in node.inputs)
    x = arranged(tensor_of(operand), operand.axes, (rows, *singles), sizes)
    return window_sum(x, node.spatial).reshape([sizes[axis] for axis in node.axes])


def sum_squares(node: SquareSum, sizes: Sizes, tensor_of: Materialise) -> Tensor:
    """Σ x² over the axes that the node does not have, in one pass without a copy of x."""
    (operand,), x = node.operands, tensor_of(node.operands[0])
    dims = [dim for dim, axis in enumerate(operand.axes) if axis not in node.axes]
    if not dims:
        return x * x
    if x.is_complex():
        return (x * x).sum(dims)
    exact = torch.promote_types(x.dtype, torch.float32)
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dim=dims, dtype=exact).square().to(x.dtype)
    rows = max(1, SQUARE_CHUNK // max(1, x[0].numel())) if 0 in dims and len(x) else len(x)
    parts = [part.to(exact).square().sum(dims) for part in x.split(max(1, rows))]
    return sum(parts[1:], parts[0]).to(x.dtype)


def autocorrelate(node: Autocorrelation, sizes: Sizes, tensor_of: Materialise) -> Tensor:
    """Σ over windows of their outer products, from offsets between pixels.

    With δ = k' − k, the sum over *all* windows that meet the image is the correlation
    R[c, c', δ] = Σ_i x[c, i] x[c', i + δ·dilation] for each pair of kernel pixels: one
    weight-VJP convolution of x with itself. Windows beyond the first and last counted one
    are taken off again; these meet few kernel rows, so their grams are small.
    """
    (operand,) = node.operands
    outer, group, row, spatial = node.roles
    roles = (outer, group + row, *((axis,) for axis in spatial))
    x = arranged(tensor_of(operand), operand.axes, roles, sizes)
    groups = prod(sizes[axis] for axis in group)
    factor = _all_windows(x, node.spatial, groups)
    for dim, axis in enumerate(node.spatial):
        for window in axis.uncounted_windows():
            _subtract_windows(factor, x, node.spatial, dim, window, groups)
    return factor.reshape([sizes[axis] for axis in node.axes])


def _all_windows(x: Tensor, spatial: Sequence[SpatialAxis], groups: int) -> Tensor:
    """(group, c, k…, c', k'…) summed over every window that meets the image.

    The correlation has the offset k' − k at index k' − k + K − 1 of each dimension.
    """
    kernels = [a.kernel_size for a in spatial]
    dilation = [a.dilation for a in spatial]
    padding = [(a.kernel_size - 1) * a.dilation for a in spatial]
    channels = x.shape[1] // groups
    ones, zeros = [1] * len(spatial), [0] * len(spatial)
    offsets = [2 * k - 1 for k in kernels]
    like = x.new_empty(1).expand(x.shape[1], channels, *offsets)
    arguments = (like, None, ones, padding, dilation, False, zeros, groups, [False, True, False])
    rows = max(-(-len(x) // CORRELATION_PARTS), CORRELATION_LEAST // max(1, x[0].numel()), 1)
    correlation = torch.zeros((), dtype=x.dtype, device=x.device)
    for part in x.split(rows):
        correlation = correlation + torch.ops.aten.convolution_backward(part, part, *arguments)[1]
    correlation = correlation.reshape(groups, channels, channels, *offsets)
    factor = x.new_empty(groups, channels, *kernels, channels, *kernels)
    for offset in product(*(range(k) for k in kernels)):
        starts = (k - 1 - at for k, at in zip(kernels, offset, strict=True))
        window = tuple(slice(s, s + k) for s, k in zip(starts, kernels, strict=True))
        factor[(slice(None), slice(None), *offset)] = correlation[(..., *window)]
    return factor


def _subtract_windows(
    factor: Tensor, x: Tensor, spatial: Sequence[SpatialAxis], dim: int, window: int, groups: int
) -> None:
    """Take off the windows with index `window` along `dim`, which is not to be counted.

    Along earlier dimensions only the counted windows are left, along later ones all.
    """
    axis = spatial[dim]
    first = window - axis.padding[0]
    met = axis.met_offsets(window)
    if not met:
        return
    low, high = met.start, met.stop
    pixels = slice(first + low * axis.dilation, first + met[-1] * axis.dilation + 1, axis.dilation)
    strip = x[(slice(None),) * (2 + dim) + (pixels,)]
    strip = strip.movedim(2 + dim, 2).reshape(x.shape[0], groups, -1, high - low, *_rest(x, dim))
    for other, a in enumerate(spatial):
        if other != dim:
            strip = _strip_windows(strip, a, counted=other < dim)
    rows = _strip_rows(strip, len(spatial), dim)
    gram = rows.mT @ rows
    channels = x.shape[1] // groups
    kernels = [high - low if d == dim else a.kernel_size for d, a in enumerate(spatial)]
    gram = gram.reshape(groups, channels, *kernels, channels, *kernels)
    places = [slice(low, high) if d == dim else slice(None) for d in range(len(spatial))]
    factor[(slice(None), slice(None), *places, slice(None), *places)] -= gram


def _rest(x: Tensor, dim: int) -> list[int]:
    return [n for d, n in enumerate(x.shape[2:]) if d != dim]


def _strip_windows(strip: Tensor, axis: SpatialAxis, counted: bool) -> Tensor:
    """Unfold the first remaining spatial dimension (4); its windows go last, (outputs, kernels)."""
    left = axis.padding[0] if counted else axis.reach - 1
    outputs = axis.output_size if counted else axis.input_size + axis.reach - 1
    right = outputs - 1 + axis.reach - left - axis.input_size
    moved = F.pad(strip.movedim(4, -1), (left, right))
    return moved.unfold(-1, axis.reach, 1)[..., :: axis.dilation]


def _strip_rows(strip: Tensor, dims: int, dim: int) -> Tensor:
    """(n, g, c, k_dim, o, k, o', k', …) as matrices (g, n·o…, c·k…), kernels in order."""
    outputs = [4 + 2 * d for d in range(dims - 1)]
    kernels = [5 + 2 * d for d in range(dims - 1)]
    kernels.insert(dim, 3)
    ordered = strip.permute(1, 0, *outputs, 2, *kernels)
    return ordered.flatten(-len(kernels) - 1).flatten(1, -2)


PRIMITIVES: dict[type[Primitive], Callable[..., Tensor]] = {
    ConvolutionCall: convolve,
    WindowSum: sum_windows,
    SquareSum: sum_squares,
    Autocorrelation: autocorrelate,
}
