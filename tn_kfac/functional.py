"""Convolutions of any number of spatial dimensions, evaluated and differentiable.

Like their namesakes in `torch.nn.functional`, which stop at three dimensions (unfold and
fold at two), for any dtype and device.
"""

from __future__ import annotations

from torch import Tensor

from tn_kfac import expressions
from tn_kfac.tensor_network.convolution import Ints, Padding

__all__ = ["conv", "conv_transpose", "fold", "unfold"]


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution of input (n, c, *in) with weight (d, c/groups, *k); shape (n, d, *out).

    Raises:
        ValueError: If a hyper-parameter is impossible.
        TypeError: If a hyper-parameter is not made of integers.
    """
    output = expressions.conv_forward(input, weight, stride, padding, dilation, groups)
    return _biased(output, bias)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """Transposed convolution with weight (c, d/groups, *k); shape (n, d, *out).

    Raises:
        ValueError: If a hyper-parameter is impossible.
        TypeError: If a hyper-parameter is not made of integers.
    """
    output = expressions.conv_transpose_forward(
        input, weight, stride, padding, output_padding, dilation, groups
    )
    return _biased(output, bias)


def unfold(
    input: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    padding: Padding = 0,
    stride: Ints = 1,
) -> Tensor:
    """Columns (n, c·K, O) of all windows of input (n, c, *in) (im2col).

    Raises:
        ValueError: If a hyper-parameter is impossible.
        TypeError: If a hyper-parameter is not made of integers.
    """
    return expressions.unfold_input(input, kernel_size, stride, padding, dilation)


def fold(
    input: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    dilation: Ints = 1,
    padding: Padding = 0,
    stride: Ints = 1,
) -> Tensor:
    """Sum of columns (n, c·K, O) over overlapping windows (col2im); (n, c, *output_size).

    An integer `output_size` stands for as many dimensions as another argument has entries, else for
    two, as in torch.

    Raises:
        ValueError: If a hyper-parameter is impossible.
        TypeError: If a hyper-parameter is not made of integers.
    """
    if isinstance(output_size, int):
        others = (kernel_size, dilation, stride, padding)
        entries = [len(other) for other in others if isinstance(other, (tuple, list))]
        output_size = (output_size,) * (entries[0] if entries else 2)
    return expressions.fold(input, output_size, kernel_size, stride, padding, dilation)


def _biased(output: Tensor, bias: Tensor | None) -> Tensor:
    """The output plus one bias per channel."""
    if bias is None:
        return output
    if tuple(bias.shape) != (output.shape[1],):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, expected ({output.shape[1]},): one per channel"
        )
    return output + bias.reshape([-1] + [1] * (output.dim() - 2))
