"""Sums over windows by our kernel, and sums of squares."""

from __future__ import annotations

import torch
from torch import Tensor

from tn_kfac.kernels.window_sum import window_sum
from tn_kfac.tensor_network.lower import SquareSum, WindowSum
from tn_kfac.tensor_network.primitives.arrange import Materialise, Sizes, arranged

SQUARE_CHUNK = 1 << 20
"""Elements that are squared at a time on a CPU, where a norm is slow."""


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
