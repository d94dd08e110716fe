"""Convolution operations as einsum expressions, all derived from one tensor network.

>>> equation, operands, shape = kfac_reduce.einsum_expression(x, kernel_size=3, padding=1)
>>> factor = torch.einsum(equation, *operands).reshape(shape)
>>> factor = kfac_reduce(x, kernel_size=3, padding=1)  # the same, planned and cached
"""

from tn_kfac.expressions.convolution import (
    conv_forward,
    conv_input_jvp,
    conv_input_vjp,
    conv_weight_jvp,
    conv_weight_vjp,
    conv_weight_vjp_per_example,
    fold,
    unfold_input,
    unfold_kernel,
)
from tn_kfac.expressions.display import draw, explain
from tn_kfac.expressions.ggn import ggn_diagonal, ggn_gram
from tn_kfac.expressions.kfac import (
    kfac_expand,
    kfac_expand_block_diagonal,
    kfac_expand_diagonal,
    kfac_expand_gradient,
    kfac_expand_transpose,
    kfac_reduce,
    kfac_reduce_block_diagonal,
    kfac_reduce_diagonal,
    kfac_reduce_gradient,
    kfac_reduce_transpose,
)
from tn_kfac.expressions.operation import Expression, Operation, operation
from tn_kfac.expressions.randomized import (
    RandomizedOperation,
    randomized_input_vjp,
    randomized_weight_vjp,
)
from tn_kfac.expressions.transposed import (
    conv_transpose_forward,
    conv_transpose_input_vjp,
    conv_transpose_weight_vjp,
    unfold_input_transpose,
)

__all__ = [
    "Expression",
    "Operation",
    "RandomizedOperation",
    "conv_forward",
    "conv_input_jvp",
    "conv_input_vjp",
    "conv_transpose_forward",
    "conv_transpose_input_vjp",
    "conv_transpose_weight_vjp",
    "conv_weight_jvp",
    "conv_weight_vjp",
    "conv_weight_vjp_per_example",
    "draw",
    "explain",
    "fold",
    "ggn_diagonal",
    "ggn_gram",
    "kfac_expand",
    "kfac_expand_block_diagonal",
    "kfac_expand_diagonal",
    "kfac_expand_gradient",
    "kfac_expand_transpose",
    "kfac_reduce",
    "kfac_reduce_block_diagonal",
    "kfac_reduce_diagonal",
    "kfac_reduce_gradient",
    "kfac_reduce_transpose",
    "operation",
    "randomized_input_vjp",
    "randomized_weight_vjp",
    "unfold_input",
    "unfold_input_transpose",
    "unfold_kernel",
]
