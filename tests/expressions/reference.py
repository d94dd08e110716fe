"""Convolutions of any dimension by index arithmetic, in plain torch; imports nothing of ours.

One gather of a padded tensor (`patches`) is the convolution's whole geometry. What follows
from it linearly is left to torch.autograd, so that no formula here is derived by hand.
Every function takes torch's hyper-parameters under torch's names; tensors are
(batch, channels, *spatial).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

Ints = int | Sequence[int]
Pads = int | str | Sequence
Axis = tuple[int, int, int, tuple[int, int]]  # kernel size, stride, dilation, (left, right)


def per_axis(value: Ints, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def axes_of(
    dims: int, kernel_size: Ints, stride: Ints, padding: Pads, dilation: Ints
) -> list[Axis]:
    """The hyper-parameters of each spatial axis; "same" puts an odd pixel on the right."""
    kernels, strides, dilations = (per_axis(v, dims) for v in (kernel_size, stride, dilation))
    axes = []
    for dim, (kernel, step, gap) in enumerate(zip(kernels, strides, dilations, strict=True)):
        if padding == "same":
            missing = gap * (kernel - 1)
            pair = (missing // 2, (missing + 1) // 2)
        elif padding == "valid":
            pair = (0, 0)
        else:
            entry = padding if isinstance(padding, int) else padding[dim]
            pair = (entry, entry) if isinstance(entry, int) else tuple(entry)
        axes.append((kernel, step, gap, pair))
    return axes


def padded(x: Tensor, axes: list[Axis]) -> Tensor:
    """`x` in the middle of zeros."""
    for dim, (_, _, _, (left, right)) in enumerate(axes, start=2):
        shape = list(x.shape)
        zeros = [x.new_zeros(*shape[:dim], width, *shape[dim + 1 :]) for width in (left, right)]
        x = torch.cat([zeros[0], x, zeros[1]], dim)
    return x


def starts(size: int, axis: Axis) -> list[int]:
    """Where the windows of a padded axis of `size` pixels begin."""
    kernel, stride, gap, _ = axis
    return [at for at in range(0, size, stride) if at + gap * (kernel - 1) < size]


def patches(x: Tensor, axes: list[Axis]) -> Tensor:
    """The windows of a padded tensor: (batch, channels, *kernel, *output)."""
    dims = len(axes)
    for axis in axes:  # the first remaining spatial dimension goes, (kernel, output) come last
        offsets = [k * axis[2] for k in range(axis[0])]
        index = torch.tensor([[at + k for at in starts(x.shape[2], axis)] for k in offsets])
        x = x[:, :, index].movedim((2, 3), (-2, -1))
    order = [2 + 2 * dim + pair for pair in (0, 1) for dim in range(dims)]
    return x.permute(0, 1, *order)


def output_size(size: Sequence[int], axes: list[Axis]) -> tuple[int, ...]:
    return tuple(
        len(starts(sum(axis[3]) + pixels, axis)) for pixels, axis in zip(size, axes, strict=True)
    )


def unfold_input(x, kernel_size, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """The unfolded input: (batch, channels·K, O)."""
    axes = axes_of(x.dim() - 2, kernel_size, stride, padding, dilation)
    K = prod(axis[0] for axis in axes)
    return patches(padded(x, axes), axes).reshape(len(x), x.shape[1] * K, -1)


def conv_forward(x, weight, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    axes = axes_of(x.dim() - 2, weight.shape[2:], stride, padding, dilation)
    columns = patches(padded(x, axes), axes)
    size = columns.shape[2 + len(axes) :]
    columns = columns.reshape(len(x), groups, -1, prod(size))
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    return (matrix @ columns).reshape(len(x), len(weight), *size)


def fold(columns, output_size, kernel_size, stride=1, padding=0, dilation=1) -> Tensor:
    """The sum of all windows at their places: (batch, channels, *output_size)."""
    axes = axes_of(len(output_size), kernel_size, stride, padding, dilation)
    return scatter(columns, output_size, axes, patches(_numbered(output_size, axes), axes))


def _numbered(size: Sequence[int], axes: list[Axis]) -> Tensor:
    """A padded tensor of one sample and channel, whose pixels hold their positions."""
    shape = [pixels + sum(axis[3]) for pixels, axis in zip(size, axes, strict=True)]
    return torch.arange(prod(shape)).reshape(1, 1, *shape)


def scatter(columns: Tensor, size: Sequence[int], axes: list[Axis], places: Tensor) -> Tensor:
    """Entry (k, o) of each channel's columns added to pixel places[k, o] of a padded tensor."""
    kernels = prod(axis[0] for axis in axes)
    batch, channels = len(columns), columns.shape[1] // kernels
    shape = _numbered(size, axes).shape[2:]
    pixels = columns.new_zeros(batch, channels, prod(shape))
    columns = columns.reshape(batch, channels, -1)
    pixels = pixels.index_add(2, places.flatten(), columns).reshape(batch, channels, *shape)
    for dim, (axis, kept) in enumerate(zip(axes, size, strict=True), start=2):
        pixels = pixels.narrow(dim, axis[3][0], kept)
    return pixels


def _vjp(function: Callable[[Tensor], Tensor], shape: Sequence[int], v: Tensor) -> Tensor:
    """The VJP of a linear function of a tensor of the given shape; differentiable itself."""
    at = torch.zeros(*shape, dtype=v.dtype, requires_grad=True)
    return torch.autograd.grad(function(at), at, v, create_graph=True)[0]


def conv_input_vjp(weight, v, input_size, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    shape = (len(v), groups * weight.shape[1], *input_size)
    return _vjp(lambda x: conv_forward(x, weight, stride, padding, dilation, groups), shape, v)


def conv_weight_vjp(x, v, kernel_size, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    kernel = per_axis(kernel_size, x.dim() - 2)
    shape = (v.shape[1], x.shape[1] // groups, *kernel)
    return _vjp(lambda w: conv_forward(x, w, stride, padding, dilation, groups), shape, v)


def conv_weight_vjp_per_example(x, v, kernel_size, *hyper, **named) -> Tensor:
    pairs = zip(x.split(1), v.split(1), strict=True)
    return torch.stack([conv_weight_vjp(*pair, kernel_size, *hyper, **named) for pair in pairs])


def _jvp(function: Callable[[Tensor], Tensor], tangent: Tensor) -> Tensor:
    return torch.func.jvp(function, (torch.zeros_like(tangent),), (tangent,))[1]


def conv_input_jvp(tangent, weight, *hyper, **named) -> Tensor:
    return _jvp(lambda x: conv_forward(x, weight, *hyper, **named), tangent)


def conv_weight_jvp(x, tangent, *hyper, **named) -> Tensor:
    return _jvp(lambda weight: conv_forward(x, weight, *hyper, **named), tangent)


def unfold_kernel(weight, input_size, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """The Toeplitz matrix, (out_channels·O, in_channels·I): the convolution of unit vectors."""
    pixels = groups * weight.shape[1] * prod(input_size)
    units = torch.eye(pixels, dtype=weight.dtype).reshape(pixels, -1, *input_size)
    return conv_forward(units, weight, stride, padding, dilation, groups).reshape(pixels, -1).T


def conv_transpose_forward(
    x, weight, stride=1, padding=0, output_padding=0, dilation=1, groups=1
) -> Tensor:
    """Each pixel of `x` adds its multiple of the kernel to the output, which is then cropped."""
    dims = x.dim() - 2
    axes = axes_of(dims, weight.shape[2:], stride, padding, dilation)
    size = transposed_size(x.shape[2:], axes, per_axis(output_padding, dims))
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    columns = matrix.mT @ x.reshape(len(x), groups, len(weight) // groups, -1)
    places = patches(_numbered(size, axes), axes)
    places = places[(..., *(slice(pixels) for pixels in x.shape[2:]))]
    return scatter(columns.reshape(len(x), -1, columns.shape[-1]), size, axes, places)


def transposed_size(size: Sequence[int], axes: list[Axis], extra: Sequence[int]) -> list[int]:
    return [
        (pixels - 1) * stride - sum(pair) + gap * (kernel - 1) + 1 + more
        for pixels, (kernel, stride, gap, pair), more in zip(size, axes, extra, strict=True)
    ]


def conv_transpose_input_vjp(weight, v, input_size, *hyper, **named) -> Tensor:
    shape = (len(v), len(weight), *input_size)
    return _vjp(lambda x: conv_transpose_forward(x, weight, *hyper, **named), shape, v)


def conv_transpose_weight_vjp(
    x, v, kernel_size, stride=1, padding=0, output_padding=0, dilation=1, groups=1
) -> Tensor:
    hyper = (stride, padding, output_padding, dilation, groups)
    shape = (x.shape[1], v.shape[1] // groups, *per_axis(kernel_size, x.dim() - 2))
    return _vjp(lambda weight: conv_transpose_forward(x, weight, *hyper), shape, v)


def unfold_input_transpose(x, kernel_size, *hyper, groups=1, **named) -> Tensor:
    """The transposed convolution of each channel with unit vectors: (batch, channels·K, O)."""
    channels, kernel = x.shape[1], per_axis(kernel_size, x.dim() - 2)
    units = torch.eye(prod(kernel), dtype=x.dtype).reshape(1, prod(kernel), *kernel)
    units = units.expand(channels, *units.shape[1:])
    y = conv_transpose_forward(x, units, *hyper, groups=channels, **named)
    return y.reshape(len(x), channels * prod(kernel), -1)


def _rows(x, kernel_size, groups, unfold=unfold_input, **hyper) -> Tensor:
    """The unfolded input of each group: (batch, groups, channels/groups·K, O)."""
    columns = unfold(x, kernel_size, **hyper)
    return columns.reshape(len(x), groups, -1, columns.shape[-1])


def _outer(rows: Tensor) -> Tensor:
    """The sum over samples and positions of outer products: (groups, features, features)."""
    return sum(sample @ sample.mT for sample in rows)


def kfac_expand(x, kernel_size, groups=1, **hyper) -> Tensor:
    """The sum over positions, and mean over samples, of outer products of patches."""
    return _outer(_rows(x, kernel_size, groups, **hyper)) / len(x)


def kfac_reduce(x, kernel_size, groups=1, **hyper) -> Tensor:
    """The mean over samples of outer products of mean patches."""
    return _outer(_rows(x, kernel_size, groups, **hyper).mean(-1, keepdim=True)) / len(x)


def kfac_expand_transpose(x, kernel_size, groups=1, **hyper) -> Tensor:
    return kfac_expand(x, kernel_size, groups, unfold=unfold_input_transpose, **hyper)


def kfac_reduce_transpose(x, kernel_size, groups=1, **hyper) -> Tensor:
    return kfac_reduce(x, kernel_size, groups, unfold=unfold_input_transpose, **hyper)


def kfac_expand_diagonal(x, kernel_size, groups=1, **hyper) -> Tensor:
    return kfac_expand(x, kernel_size, groups, **hyper).diagonal(dim1=1, dim2=2)


def kfac_reduce_diagonal(x, kernel_size, groups=1, **hyper) -> Tensor:
    return kfac_reduce(x, kernel_size, groups, **hyper).diagonal(dim1=1, dim2=2)


def _blocks(factor: Tensor, size: int) -> Tensor:
    """The diagonal blocks of each group's factor: (groups, blocks, size, size)."""
    at = range(0, factor.shape[1], size)
    return torch.stack([factor[:, i : i + size, i : i + size] for i in at], 1)


def kfac_expand_block_diagonal(x, kernel_size, groups=1, **hyper) -> Tensor:
    """The blocks of the channels."""
    K = prod(per_axis(kernel_size, x.dim() - 2))
    return _blocks(kfac_expand(x, kernel_size, groups, **hyper), K)


def kfac_reduce_block_diagonal(x, kernel_size, groups=1, **hyper) -> Tensor:
    K = prod(per_axis(kernel_size, x.dim() - 2))
    return _blocks(kfac_reduce(x, kernel_size, groups, **hyper), K)


def kfac_expand_gradient(v, groups=1) -> Tensor:
    """The sum over samples and positions of outer products of channels."""
    return _outer(v.reshape(len(v), groups, v.shape[1] // groups, -1))


def kfac_reduce_gradient(v, groups=1) -> Tensor:
    """The sum over samples of outer products of channels that were summed over positions."""
    return _outer(v.reshape(len(v), groups, v.shape[1] // groups, -1).sum(-1, keepdim=True))


def _gradients(x, v, kernel_size, *hyper, **named) -> Tensor:
    """The weight VJP of each example, for v (n, d, *out) or a stack of them: (s·n, *weight)."""
    stack = v if v.dim() > x.dim() else v[None]
    each = (conv_weight_vjp_per_example(x, u, kernel_size, *hyper, **named) for u in stack)
    return torch.cat(list(each))


def ggn_diagonal(x, v, kernel_size, *hyper, **named) -> Tensor:
    return (_gradients(x, v, kernel_size, *hyper, **named) ** 2).sum(0)


def ggn_gram(x, v, kernel_size, *hyper, **named) -> Tensor:
    gradients = _gradients(x, v, kernel_size, *hyper, **named).flatten(1)
    return gradients @ gradients.T
