"""Diagonal and Gram matrix of a layer's GGN or Fisher, from per-example weight VJPs.

With v[s, n] the gradient of example n (or column s of a square root of the loss Hessian,
propagated back to the layer's output) and J[s, n] = ∂⟨v[s, n], y[n]⟩/∂w, these are
Σ_{s,n} J[s, n]² and ⟨J[s, n], J[s', n']⟩ (https://arxiv.org/abs/1912.10985 and
https://arxiv.org/abs/2106.02624).
"""

from __future__ import annotations

from torch import Tensor

from tn_kfac.expressions.operation import Expression, Shaped, operation
from tn_kfac.expressions.shapes import of_input
from tn_kfac.tensor_network.convolution import Convolution, Ints, Padding
from tn_kfac.tensor_network.network import Axes, Network


@operation
def ggn_diagonal(
    x: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Diagonal of the GGN for the weight; v is ([s,] n, d, *out), shape (d, c/groups, *k)."""
    conv, jacobian, _ = _jacobian(x, v, kernel_size, stride, padding, dilation, groups)
    weight = ("d", "c", *conv.kernels)
    network = jacobian.gram(weight, keep=("g",))
    for axis in weight:
        network = network.tie(axis, f"{axis}'")
    kernels = ((k,) for k in conv.kernels)
    return Expression(network.arranged(("g", "d"), ("c",), *kernels), simplify)


@operation
def ggn_gram(
    x: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    simplify: bool = True,
) -> Expression:
    """Gram matrix of the layer; v is ([s,] n, d, *out), shape (s·n, s·n)."""
    _, jacobian, rows = _jacobian(x, v, kernel_size, stride, padding, dilation, groups)
    return Expression(jacobian.gram(rows), simplify)


def _jacobian(
    x: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
) -> tuple[Convolution, Network, Axes]:
    """Per-example weight VJPs, and the axes that number them: (s, n) or (n)."""
    stacked = len(v.shape) == len(x.shape) + 1
    gradient = Shaped(v.shape[1:]) if stacked else v
    conv = of_input(x, kernel_size, stride, padding, dilation, groups, v=gradient)
    jacobian = conv.network().vjp("weight", "v", keep=("n",))
    if not stacked:
        return conv, jacobian, ("n",)
    return conv, jacobian.stacked("v", "s", v.shape[0]), ("s", "n")
