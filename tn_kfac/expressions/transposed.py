"""Transposed convolutions: the convolution's network with windows and pixels exchanged."""

from __future__ import annotations

from torch import Tensor

from tn_kfac.expressions.operation import Expression, operation
from tn_kfac.expressions.shapes import (
    of_transposed_input,
    of_transposed_pair,
    of_transposed_weight,
)
from tn_kfac.tensor_network.convolution import Ints, Padding


@operation
def conv_transpose_forward(
    x: Tensor,
    weight: Tensor,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Transposed convolution of x (n, c, *in) with weight (c, d/groups, *k); shape (n, d, *out)."""
    conv = of_transposed_pair(x, weight, stride, padding, output_padding, dilation, groups)
    return Expression(conv.network(), simplify)


@operation
def conv_transpose_input_vjp(
    weight: Tensor,
    v: Tensor,
    input_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Gradient of ⟨v, y⟩ for the input, of spatial size `input_size`; shape (n, c, *in)."""
    conv = of_transposed_weight(
        v, weight, input_size, stride, padding, output_padding, dilation, groups
    )
    return Expression(conv.network().vjp("x", "v"), simplify)


@operation
def conv_transpose_weight_vjp(
    x: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Gradient of ⟨v, y⟩ for the weight; shape (c, d/groups, *k)."""
    conv = of_transposed_input(
        x, kernel_size, stride, padding, output_padding, dilation, groups, v=v
    )
    return Expression(conv.network().vjp("weight", "v"), simplify)


@operation
def unfold_input_transpose(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Unfolded input: the Jacobian for the weight; shape (n, c·K, O), O pixels of the output."""
    conv = of_transposed_input(x, kernel_size, stride, padding, output_padding, dilation, groups)
    unfolded = conv.rows().network.arranged(("n",), ("g", "c", *conv.kernels), conv.outputs)
    return Expression(unfolded, simplify)
