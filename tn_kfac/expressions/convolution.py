"""Convolutions and their derivatives, each one operator away from the forward network."""

from __future__ import annotations

from torch import Tensor

from tn_kfac.expressions.operation import Expression, operation
from tn_kfac.expressions.shapes import check_shape, of_columns, of_input, of_pair, of_weight
from tn_kfac.tensor_network.convolution import Ints, Padding


@operation
def conv_forward(
    x: Tensor,
    weight: Tensor,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Convolution of x (n, c, *in) with weight (d, c/groups, *k); shape (n, d, *out)."""
    conv = of_pair(x, weight, stride, padding, dilation, groups)
    return Expression(conv.network(), simplify)


@operation
def conv_input_vjp(
    weight: Tensor,
    v: Tensor,
    input_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Gradient of ⟨v, y⟩ for the input, of spatial size `input_size`; shape (n, c, *in)."""
    conv = of_weight(v, weight, input_size, stride, padding, dilation, groups)
    return Expression(conv.network().vjp("x", "v"), simplify)


@operation
def conv_weight_vjp(
    x: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Gradient of ⟨v, y⟩ for the weight; shape (d, c/groups, *k)."""
    conv = of_input(x, kernel_size, stride, padding, dilation, groups, v=v)
    return Expression(conv.network().vjp("weight", "v"), simplify)


@operation
def conv_weight_vjp_per_example(
    x: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Gradient of ⟨v[n], y[n]⟩ for the weight, of each example; shape (n, d, c/groups, *k)."""
    conv = of_input(x, kernel_size, stride, padding, dilation, groups, v=v)
    return Expression(conv.network().vjp("weight", "v", keep=("n",)), simplify)


@operation
def conv_input_jvp(
    tangent: Tensor,
    weight: Tensor,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Derivative along a tangent (n, c, *in) of the input; shape (n, d, *out)."""
    names = ("tangent", "weight")
    conv = of_pair(tangent, weight, stride, padding, dilation, groups, names)
    return Expression(conv.network().jvp("x", "tangent"), simplify)


@operation
def conv_weight_jvp(
    x: Tensor,
    tangent: Tensor,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Derivative along a tangent (d, c/groups, *k) of the weight; shape (n, d, *out)."""
    names = ("x", "tangent")
    conv = of_pair(x, tangent, stride, padding, dilation, groups, names)
    return Expression(conv.network().jvp("weight", "tangent"), simplify)


@operation
def unfold_input(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Unfolded input (im2col): the Jacobian for the weight; shape (n, c·K, O).

    `groups` changes nothing but the network.
    """
    conv = of_input(x, kernel_size, stride, padding, dilation, groups)
    unfolded = conv.rows().network.arranged(("n",), ("g", "c", *conv.kernels), conv.outputs)
    return Expression(unfolded, simplify)


@operation
def unfold_kernel(
    weight: Tensor,
    input_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Unfolded kernel (Toeplitz matrix): the Jacobian for the input; shape (d·O, c·I).

    With groups, the blocks between different groups are zero.
    """
    conv = of_weight(None, weight, input_size, stride, padding, dilation, groups)
    rows, columns = ("g", "d", *conv.outputs), ("g'", "c", *conv.inputs)
    jacobian = conv.network().jacobian("x").untied("g", "g'")
    return Expression(jacobian.arranged(rows, columns), simplify)


@operation
def fold(
    columns: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    simplify: bool = True,
) -> Expression:
    """Sum of columns (n, c·K, O) over overlapping windows (col2im); shape (n, c, *output_size).

    The adjoint of `unfold_input` for an input of spatial size `output_size`: one entry for each
    dimension, unless another argument says how many there are.
    """
    conv = of_columns(columns, output_size, kernel_size, stride, padding, dilation)
    unfolded = conv.rows().network.arranged(("n",), ("g", "c", *conv.kernels), conv.outputs)
    check_shape("columns", columns.shape, unfolded.shape)
    return Expression(unfolded.vjp("x", "columns"), simplify)
