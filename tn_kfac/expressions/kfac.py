"""Kronecker factors of (transposed) convolutions, whole, in blocks, or their diagonal.

KFAC-expand: https://arxiv.org/abs/1602.01407 and https://arxiv.org/abs/2311.00636,
Equation 19; KFAC-reduce: the latter, Equation 21. Input factors are normalised by the
batch size n, those of KFAC-reduce average over the O output positions.
"""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from tn_kfac.expressions.operation import Expression, operation
from tn_kfac.expressions.shapes import of_input, of_transposed_input
from tn_kfac.tensor_network.convolution import Ints, Padding, require_int
from tn_kfac.tensor_network.network import Axes, Network
from tn_kfac.tensor_network.rows import Approx, Rows, channel_rows


def _factor(rows: Rows, approx: Approx, tied: Axes = ()) -> Network:
    """The normalised factor with the axes `tied` on its diagonal.

    Raises:
        ValueError: If the batch is empty.
    """
    if rows.samples == 0:
        shape = rows.network.operand_shape("x")
        raise ValueError(f"x has shape {shape}: an empty batch has no mean, so skip it")
    return rows.factor(approx, mean=True, tied=tied).scaled(Fraction(1, rows.samples))


@operation
def kfac_expand(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Input factor of KFAC-expand: Σ_{n,o} of outer products of unfolded inputs, over n.

    Shape (groups, c/groups·K, c/groups·K).
    """
    rows = of_input(x, kernel_size, stride, padding, dilation, groups).rows()
    return Expression(_factor(rows, "expand"), simplify)


@operation
def kfac_reduce(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Input factor of KFAC-reduce: Σ_n of outer products of summed unfolded inputs, over n·O².

    Shape (groups, c/groups·K, c/groups·K).
    """
    rows = of_input(x, kernel_size, stride, padding, dilation, groups).rows()
    return Expression(_factor(rows, "reduce"), simplify)


@operation
def kfac_expand_diagonal(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Diagonal of `kfac_expand`: the window sums of x²; shape (groups, c/groups·K)."""
    rows = of_input(x, kernel_size, stride, padding, dilation, groups).rows()
    return Expression(_factor(rows, "expand", tied=rows.feature), simplify)


@operation
def kfac_reduce_diagonal(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Diagonal of `kfac_reduce`: the squared window sums of x; shape (groups, c/groups·K)."""
    rows = of_input(x, kernel_size, stride, padding, dilation, groups).rows()
    return Expression(_factor(rows, "reduce", tied=rows.feature), simplify)


@operation
def kfac_expand_block_diagonal(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Blocks of `kfac_expand`, one per channel; shape (groups, c/groups, K, K)."""
    conv = of_input(x, kernel_size, stride, padding, dilation, groups)
    blocks = _factor(conv.rows(), "expand", tied=("c",))
    return Expression(_as_blocks(blocks, conv.kernels), simplify)


@operation
def kfac_reduce_block_diagonal(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Blocks of `kfac_reduce`, one per channel; shape (groups, c/groups, K, K)."""
    conv = of_input(x, kernel_size, stride, padding, dilation, groups)
    blocks = _factor(conv.rows(), "reduce", tied=("c",))
    return Expression(_as_blocks(blocks, conv.kernels), simplify)


def _as_blocks(network: Network, kernels: Axes) -> Network:
    return network.arranged(("g",), ("c",), kernels, tuple(f"{k}'" for k in kernels))


@operation
def kfac_expand_transpose(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """`kfac_expand` of a transposed convolution; shape (groups, c/groups·K, c/groups·K)."""
    conv = of_transposed_input(x, kernel_size, stride, padding, output_padding, dilation, groups)
    return Expression(_factor(conv.rows(), "expand"), simplify)


@operation
def kfac_reduce_transpose(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """`kfac_reduce` of a transposed convolution; shape (groups, c/groups·K, c/groups·K)."""
    conv = of_transposed_input(x, kernel_size, stride, padding, output_padding, dilation, groups)
    return Expression(_factor(conv.rows(), "reduce"), simplify)


@operation
def kfac_expand_gradient(v: Tensor, groups: int = 1, simplify: bool = True) -> Expression:
    """Output factor of KFAC-expand: Σ_{n,o} v vᵀ over channels; shape (groups, d/groups, same)."""
    return Expression(_gradient_rows(v, groups).factor("expand"), simplify)


@operation
def kfac_reduce_gradient(v: Tensor, groups: int = 1, simplify: bool = True) -> Expression:
    """Output factor of KFAC-reduce: Σ_n (Σ_o v)(Σ_o v)ᵀ; shape (groups, d/groups, same)."""
    return Expression(_gradient_rows(v, groups).factor("reduce"), simplify)


def _gradient_rows(v: Tensor, groups: int) -> Rows:
    if len(v.shape) < 2 or v.shape[1] % require_int("groups", groups, 1):
        raise ValueError(
            f"v has shape {tuple(v.shape)} and groups={groups}: expected (batch, channels, "
            "*spatial) with channels divisible by groups"
        )
    batch, channels, *spatial = v.shape
    return channel_rows("v", batch, groups, channels // groups, spatial)
