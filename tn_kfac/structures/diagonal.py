"""Diagonal matrices: coordinates are the diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tn_kfac.structures.base import Reads, Structure


@dataclass(frozen=True)
class Diagonal(Structure):
    """Diagonal d×d matrices; Π keeps the diagonal. Every operation costs O(d)."""

    reads: ClassVar[Reads] = "diagonal"
    invertible: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "diagonal"

    def coordinate_shape(self, dim: int) -> tuple[int, ...]:
        return (dim,)

    def trace(self, matrix: Tensor) -> Tensor:
        return matrix.sum(-1)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right

    def apply(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return matrix[..., None] * dense

    def apply_transposed(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return self.apply(matrix, dense)

    def curvature(self, matrix: Tensor, statistic: Tensor) -> Tensor:
        return matrix * statistic * matrix

    def gram(self, matrix: Tensor) -> Tensor:
        return matrix * matrix

    def project_gram(self, rows: Tensor) -> Tensor:
        return rows.square().sum(-2)

    def add_to_diagonal_(self, matrix: Tensor, value: float) -> Tensor:
        return matrix.add_(value)

    def border(self, block: Tensor, column: Tensor | None, corner: Tensor) -> Tensor:
        return torch.cat([block, corner[..., None]], dim=-1)

    def spectral_norm(self, matrix: Tensor, dim: int) -> Tensor:
        return self.largest(matrix)

    def inverse_root(self, matrix: Tensor) -> Tensor:
        return matrix.rsqrt()

    def blocks(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return (matrix[..., None, None],)

    def from_blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        return blocks[0][..., 0, 0]

    def to_dense(self, matrix: Tensor) -> Tensor:
        return torch.diag_embed(matrix)
