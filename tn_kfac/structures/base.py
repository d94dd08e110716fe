"""What a structured matrix space must offer.

A structure is a frozen spec; a matrix of the space is a tensor of *linear
coordinates*, shape (*batch, *coordinates). Because coordinates are linear, adding,
scaling and reducing across machines are the tensor's own operations. Leading batch
dimensions are independent matrices (channel groups of a layer).

The space is closed under products, and Π projects a symmetric matrix onto it: entries
that are stored for (i, j) alone carry those of (j, i) too, so that tr(Π(S) X) = tr(S X)
for symmetric matrices X = M + Mᵀ of the space's M (https://arxiv.org/abs/2312.05705, Table 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

Reads = Literal["diagonal", "gram", "rows"]
POWER_ITERATIONS = 3


def require_integer(argument: str, value: object, least: int) -> None:
    """Check an argument of a spec.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{argument} must be at least {least}, got {value}")


class Spec(ABC):
    """What users choose: a structure, or how to find one for a factor's size."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The string that names it, as users write it."""

    @abstractmethod
    def for_dim(self, dim: int) -> Structure:
        """The structure of a d×d factor."""


class Structure(Spec):
    """A space of structured d×d matrices. Subclasses are frozen dataclasses.

    Attributes:
        reads: What Π(Kᵀ H K) of a gram H = Σ r rᵀ is formed from: the diagonal of H, the gram
            itself, or its rows r, which are projected one by one and H is never formed.
        invertible: Whether inverses, roots and eigenvectors of the space's symmetric matrices
            are in the space: they are those of its `blocks`.
    """

    reads: ClassVar[Reads] = "rows"
    invertible: ClassVar[bool] = False

    def for_dim(self, dim: int) -> Structure:
        return self

    @abstractmethod
    def coordinate_shape(self, dim: int) -> tuple[int, ...]:
        """Shape of the coordinates of one d×d matrix."""

    @abstractmethod
    def trace(self, matrix: Tensor) -> Tensor:
        """The trace of each matrix, (*batch)."""

    @abstractmethod
    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Coordinates of left · right."""

    @abstractmethod
    def apply(self, matrix: Tensor, dense: Tensor) -> Tensor:
        """matrix · dense for dense (*batch, d, m)."""

    @abstractmethod
    def apply_transposed(self, matrix: Tensor, dense: Tensor) -> Tensor:
        """matrixᵀ · dense for dense (*batch, d, m)."""

    @abstractmethod
    def gram(self, matrix: Tensor) -> Tensor:
        """Π(matrixᵀ · matrix)."""

    @abstractmethod
    def project_gram(self, rows: Tensor) -> Tensor:
        """Π(rowsᵀ · rows) for rows (*batch, m, d)."""

    @abstractmethod
    def add_to_diagonal_(self, matrix: Tensor, value: float) -> Tensor:
        """matrix + value · I, in place."""

    @abstractmethod
    def to_dense(self, matrix: Tensor) -> Tensor:
        """The matrices themselves, (*batch, d, d)."""

    def eye(self, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Coordinates of `batch` identities, (batch, *coordinates)."""
        zeros = torch.zeros(batch, *self.coordinate_shape(dim), dtype=dtype, device=device)
        return self.add_to_diagonal_(zeros, 1.0)

    def curvature(self, matrix: Tensor, statistic: Tensor) -> Tensor:
        """Π(matrixᵀ H matrix), from what the capture formed of H.

        That is H, its diagonal, or already this projection (`reads`).
        """
        return statistic

    def border(self, block: Tensor, column: Tensor | None, corner: Tensor) -> Tensor:
        """Coordinates of [[block, column], [columnᵀ, corner]], unless rows are read.

        Shapes: block (*batch, *coordinates), column (*batch, d), corner (*batch). The
        column may be None where the diagonal is read.
        """
        raise AssertionError(f"{self.name}: a bias is one more entry of each row")

    def inverse_root(self, matrix: Tensor) -> Tensor | None:
        """R of the space with R Rᵀ = matrix⁻¹, for positive matrices of the space.

        None where the space has no such R; entries that are not finite where a matrix is not
        positive.
        """
        return None

    def blocks(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The square blocks along the diagonal that hold all entries, (*batch, count, b, b).

        One tensor for each size b, in the order of the rows.
        """
        raise AssertionError(f"{self.name} has no blocks")

    def from_blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        """The inverse of `blocks`."""
        raise AssertionError(f"{self.name} has no blocks")

    def scale(self, matrix: Tensor, factors: Tensor) -> Tensor:
        """Each matrix times its own factor; `factors` has shape (*batch)."""
        return matrix * factors.reshape(*factors.shape, *(1 for _ in self.coordinate_shape(1)))

    def largest(self, matrix: Tensor) -> Tensor:
        """The largest absolute coordinate of each matrix, (*batch)."""
        return matrix.abs().flatten(-len(self.coordinate_shape(1))).amax(-1)

    def spectral_norm(self, matrix: Tensor, dim: int) -> Tensor:
        """An estimate, from below, of the largest singular value of each matrix, (*batch).

        By a few power iterations, which find one dominant direction at once.
        """
        largest = self.largest(matrix)
        least = torch.finfo(matrix.dtype).tiny
        matrix = self.scale(matrix, largest.clamp(min=least).reciprocal())  # squares are finite
        vector = torch.arange(dim, dtype=matrix.dtype, device=matrix.device).cos()[:, None]
        vector = vector.expand(*largest.shape, dim, 1)
        size = largest
        for _ in range(POWER_ITERATIONS):
            vector = vector / vector.norm(dim=-2, keepdim=True).clamp(min=least)
            vector = self.apply(matrix, vector)
            size = vector.norm(dim=(-2, -1))
            vector = self.apply_transposed(matrix, vector)
        return size * largest

    def norm(self, matrix: Tensor) -> Tensor:
        """The Frobenius norm of each matrix, (*batch)."""
        return torch.linalg.vector_norm(matrix.flatten(-len(self.coordinate_shape(1))), dim=-1)
