"""Cholesky factors of stacks of matrices, and triangular systems with stacks.

Batched solvers of GPUs give each matrix to one multiprocessor, which suits small ones. Large ones
are taken one by one, each by the whole GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512
"""Of a matrix that a GPU takes alone."""


def cholesky(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors (n, b, b), and `info` (n): zero, where there is one; nothing is raised."""
    if not _one_by_one(stack):
        return torch.linalg.cholesky_ex(stack)
    found = [torch.linalg.cholesky_ex(matrix) for matrix in stack]
    return torch.stack([lower for lower, _ in found]), torch.stack([info for _, info in found])


def over_lower(left: Tensor, lower: Tensor) -> Tensor:
    """left · lower⁻ᵀ for stacks (n, b, b) of lower triangular matrices."""
    if not _one_by_one(lower):
        return torch.linalg.solve_triangular(lower.mT, left, upper=True, left=False)
    pairs = zip(left, lower, strict=True)
    return torch.stack(
        [torch.linalg.solve_triangular(L.mT, x, upper=True, left=False) for x, L in pairs]
    )


def _one_by_one(stack: Tensor) -> bool:
    """Whether these are several large matrices on a GPU."""
    return stack.is_cuda and len(stack) > 1 and stack.shape[-1] >= ROWS
