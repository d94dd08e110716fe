"""Dense matrices: coordinates are the entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tn_kfac.kernels.products import product
from tn_kfac.structures.base import Reads, Structure


@dataclass(frozen=True)
class Dense(Structure):
    """All d×d matrices; Π is the identity. Products cost O(d³)."""

    reads: ClassVar[Reads] = "gram"
    invertible: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "dense"

    def coordinate_shape(self, dim: int) -> tuple[int, ...]:
        return (dim, dim)

    def trace(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return product(left, right)

    def apply(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return product(matrix, dense)

    def apply_transposed(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return product(matrix.mT, dense)

    def curvature(self, matrix: Tensor, statistic: Tensor) -> Tensor:
        return product(product(matrix.mT, statistic), matrix)

    def gram(self, matrix: Tensor) -> Tensor:
        return product(matrix.mT, matrix)

    def project_gram(self, rows: Tensor) -> Tensor:
        return rows.mT @ rows

    def add_to_diagonal_(self, matrix: Tensor, value: float) -> Tensor:
        matrix.diagonal(dim1=-2, dim2=-1).add_(value)
        return matrix

    def border(self, block: Tensor, column: Tensor | None, corner: Tensor) -> Tensor:
        assert column is not None
        right = torch.cat([column, corner[..., None]], dim=-1)[..., None]
        return torch.cat([torch.cat([block, column[..., None, :]], dim=-2), right], dim=-1)

    def inverse_root(self, matrix: Tensor) -> Tensor:
        return inverse_cholesky(matrix)

    def blocks(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return (matrix[..., None, :, :],)

    def from_blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        return blocks[0].squeeze(-3)

    def to_dense(self, matrix: Tensor) -> Tensor:
        return matrix


def inverse_cholesky(matrix: Tensor) -> Tensor:
    """R = L⁻ᵀ for matrix = L Lᵀ, so that R Rᵀ = matrix⁻¹; NaN where there is no L.

    Nothing is read on the host.
    """
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    lower, info = torch.linalg.cholesky_ex(exact)
    identity = torch.eye(matrix.shape[-1], dtype=exact.dtype, device=matrix.device)
    root = torch.linalg.solve_triangular(lower, identity.expand_as(lower), upper=False).mT
    return torch.where((info == 0)[..., None, None], root, torch.nan).to(matrix.dtype)
