"""Convolution operations as einsum expressions, derived from one tensor network.

    equation, operands, shape = kfac_reduce.einsum_expression(x, kernel_size=3, padding=1)
    factor = torch.einsum(equation, *operands).reshape(shape)
"""

from fractions import Fraction
from math import prod

from tn_kfac.expressions.operations import InputOperation
from tn_kfac.tensor_network.convolution import Convolution
from tn_kfac.tensor_network.network import Network
from tn_kfac.tensor_network.rows import Rows

__all__ = ["kfac_expand", "kfac_reduce", "unfold_input"]


def _rows(conv: Convolution) -> Rows:
    return Rows(conv.unfolded_input(), ("n",), conv.names("o"), ("g",), ("c", *conv.names("k")))


def _unfold_input(conv: Convolution) -> Network:
    rows = ("g", "c", *conv.names("k"))
    return conv.unfolded_input().arranged(("n",), rows, conv.names("o"))


def _kfac_expand(conv: Convolution) -> Network:
    return _rows(conv).factor("expand").scaled(Fraction(1, conv.batch))


def _kfac_reduce(conv: Convolution) -> Network:
    scale = Fraction(1, conv.batch * prod(conv.output_size) ** 2)
    return _rows(conv).factor("reduce").scaled(scale)


unfold_input = InputOperation(
    _unfold_input,
    "Unfolded input (im2col), shape (batch, channels·K, O). https://arxiv.org/abs/2307.02275",
)
kfac_expand = InputOperation(
    _kfac_expand,
    """KFAC-expand input factor: Σ_{n,o} of outer products of unfolded inputs, over the batch size.

    Shape (groups, channels/groups·K, channels/groups·K).
    https://arxiv.org/abs/1602.01407, https://arxiv.org/abs/2311.00636 Equation 19.
    """,
)
kfac_reduce = InputOperation(
    _kfac_reduce,
    """KFAC-reduce input factor: mean over the batch of outer products of unfolded inputs
    that were averaged over their positions.

    Shape (groups, channels/groups·K, channels/groups·K).
    https://arxiv.org/abs/2311.00636 Equation 21.
    """,
)
