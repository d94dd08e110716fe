"""What a structured matrix space must offer.

A structure is a frozen spec; a matrix of the space is a tensor of *linear
coordinates*, shape (*batch, *coordinates). Because coordinates are linear, adding,
scaling and reducing across machines are the tensor's own operations. Leading batch
dimensions are independent matrices (channel groups of a layer).

The space is closed under products, and Π projects a symmetric matrix onto it
(https://arxiv.org/abs/2312.05705, Table 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Structure(ABC):
    """A space of structured d×d matrices. Subclasses are frozen dataclasses.

    Attributes:
        diagonal_suffices: Whether Π(Kᵀ H K) needs only the diagonal of H.
    """

    diagonal_suffices: ClassVar[bool]

    @property
    @abstractmethod
    def name(self) -> str:
        """The string that names this structure, as users write it."""

    @abstractmethod
    def coordinate_shape(self, dim: int) -> tuple[int, ...]:
        """Shape of the coordinates of one d×d matrix."""

    @abstractmethod
    def eye(self, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Coordinates of `batch` identities, (batch, *coordinates)."""

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
    def congruence(self, matrix: Tensor, symmetric: Tensor) -> Tensor:
        """Π(matrixᵀ · symmetric · matrix), for a symmetric matrix of the space."""

    @abstractmethod
    def gram(self, matrix: Tensor) -> Tensor:
        """Π(matrixᵀ · matrix)."""

    @abstractmethod
    def add_to_diagonal_(self, matrix: Tensor, value: float) -> Tensor:
        """matrix + value · I, in place."""

    @abstractmethod
    def border(self, block: Tensor, column: Tensor | None, corner: Tensor) -> Tensor:
        """Coordinates of [[block, column], [columnᵀ, corner]].

        Shapes: block (*batch, *coordinates), column (*batch, d), corner (*batch). The
        column may be None where `diagonal_suffices`.
        """

    @abstractmethod
    def to_dense(self, matrix: Tensor) -> Tensor:
        """The matrices themselves, (*batch, d, d)."""

    def scale(self, matrix: Tensor, factors: Tensor) -> Tensor:
        """Each matrix times its own factor; `factors` has shape (*batch)."""
        return matrix * factors.reshape(*factors.shape, *(1 for _ in self.coordinate_shape(1)))

    def largest(self, matrix: Tensor) -> Tensor:
        """The largest absolute coordinate of each matrix, (*batch)."""
        return matrix.abs().flatten(-len(self.coordinate_shape(1))).amax(-1)
