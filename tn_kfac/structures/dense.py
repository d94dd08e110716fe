"""Dense matrices: coordinates are the entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tn_kfac.structures.base import Structure


@dataclass(frozen=True)
class Dense(Structure):
    """All d×d matrices; Π is the identity. Product and congruence cost O(d³)."""

    diagonal_suffices: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return "dense"

    def coordinate_shape(self, dim: int) -> tuple[int, ...]:
        return (dim, dim)

    def eye(self, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.eye(dim, dtype=dtype, device=device).repeat(batch, 1, 1)

    def trace(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def apply(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return matrix @ dense

    def apply_transposed(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return matrix.mT @ dense

    def congruence(self, matrix: Tensor, symmetric: Tensor) -> Tensor:
        return matrix.mT @ symmetric @ matrix

    def gram(self, matrix: Tensor) -> Tensor:
        return matrix.mT @ matrix

    def add_to_diagonal_(self, matrix: Tensor, value: float) -> Tensor:
        matrix.diagonal(dim1=-2, dim2=-1).add_(value)
        return matrix

    def border(self, block: Tensor, column: Tensor | None, corner: Tensor) -> Tensor:
        assert column is not None
        right = torch.cat([column, corner[..., None]], dim=-1)[..., None]
        return torch.cat([torch.cat([block, column[..., None, :]], dim=-2), right], dim=-1)

    def to_dense(self, matrix: Tensor) -> Tensor:
        return matrix
