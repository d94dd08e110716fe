"""Sums over windows by our kernel, and sums of squares."""

from __future__ import annotations

import torch
from torch import Tensor

from tn_kfac.kernels.window_sum import window_sum
from tn_kfac.tensor_network.lower import SquareSum, WindowSum
from tn_kfac.tensor_network.primitives.arrange import (
    Materialise,
    Sizes,
    arranged,
    last_run,
    sum_over,
)

SMALL = 1 << 18
"""Elements that are squared into a copy on a GPU too."""
SQUARE_CHUNK = 1 << 20
"""Elements that are squared at a time on a CPU, where a norm is slow."""


def sum_windows(
    node: WindowSum, sizes: Sizes, tensor_of: Materialise, dtype: torch.dtype
) -> Tensor:
    """The window sums of an operand, with one dimension per axis of the node."""
    (operand,), (rows, _) = node.operands, node.groups
    singles = tuple((axis,) for axis in node.inputs)
    x = arranged(tensor_of(operand).to(dtype), operand.axes, (rows, *singles))
    return window_sum(x, node.spatial).reshape(node.shape)


def sum_squares(
    node: SquareSum, sizes: Sizes, tensor_of: Materialise, dtype: torch.dtype
) -> Tensor:
    """The scaled Σ x² over the axes that the node does not have.

    On a GPU a large x is not copied; the mean of a small one takes fewer launches than a norm.
    """
    x, dims = tensor_of(node.operands[0]).to(dtype), node.dims
    if not dims:
        return _scaled(x * x, node.factor)
    if node.is_mean and x.numel() <= SMALL:
        return _squared(x).mean(dims).to(x.dtype)
    if x.is_cuda and not x.is_complex():
        exact = torch.promote_types(x.dtype, torch.float32)
        return _scaled(_by_norm(x, dims, exact), node.factor).to(x.dtype)
    parts = x.split(max(1, len(x) * SQUARE_CHUNK // x.numel())) if _is_large(x, dims) else (x,)
    total = sum_over(_squared(parts[0]), dims)
    for part in parts[1:]:
        total = total + sum_over(_squared(part), dims)
    return _scaled(total, node.factor).to(x.dtype)


def _scaled(total: Tensor, scale: float) -> Tensor:
    return total if scale == 1.0 else total * scale


def _is_large(x: Tensor, dims: list[int]) -> bool:
    """Whether to square a few rows at a time."""
    return x.numel() > SQUARE_CHUNK and 0 in dims and not x.is_complex()


def _squared(x: Tensor) -> Tensor:
    """The squares, in float32 if x has less."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x * x


def _by_norm(x: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
    """Σ x² by norms over the last run of neighbouring dimensions, then a sum over the others.

    A norm over dimensions that are not neighbours is slow.
    """
    run = last_run(dims)
    squares = torch.linalg.vector_norm(x, dim=run, dtype=dtype).square()
    return sum_over(squares, dims[: -len(run)])
