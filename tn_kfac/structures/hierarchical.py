"""Hierarchical and arrow matrices: a few dense rows around a diagonal."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tn_kfac.structures.base import Structure, require_integer
from tn_kfac.structures.toeplitz import TRIANGLES


class _Parts(NamedTuple):
    """Views of coordinates: `top` (k1, d), `middle` (d), `bottom` (k2, d)."""

    top: Tensor
    middle: Tensor
    bottom: Tensor


class _DenseRows(Structure):
    """[[A, B₁, B₂], [0, C, 0], [0, D, E]] with k1 rows A B, a diagonal C and k2 rows D E.

    Or the transpose of it.

    Coordinates are (k1 + 1 + k2, d): the first rows, the diagonal, and the last rows, each with
    zeros where the matrix has them. In a matrix with d < k1 + k2 rows the first ones come first.
    With k = k1 + k2, a product costs O(d k²), one with a vector O(d k), as does the
    projection of a row. Π doubles B and D, which also stand for their mirror images.
    """

    @property
    @abstractmethod
    def _shape(self) -> tuple[int, int, bool]:
        """k1, k2, and whether it is transposed."""

    def coordinate_shape(self, dim: int) -> tuple[int, ...]:
        top, bottom = self._rows(dim)
        return (top + 1 + bottom, dim)

    def _rows(self, dim: int) -> tuple[int, int]:
        """k1 and k2 in a matrix of d rows."""
        top, bottom, _ = self._shape
        top = min(top, dim)
        return top, min(bottom, dim - top)

    def _parts(self, matrix: Tensor) -> _Parts:
        top, bottom = self._rows(matrix.shape[-1])
        first, middle, last = matrix.split([top, 1, bottom], dim=-2)
        return _Parts(first, middle.squeeze(-2), last)

    def _cut(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (*batch, m, d) at the columns of A, C and E."""
        dim = rows.shape[-1]
        top, bottom = self._rows(dim)
        first, middle, last = rows.split([top, dim - top - bottom, bottom], dim=-1)
        return first, middle, last

    def _places(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """How often each coordinate is in a symmetric matrix, and whether on the diagonal.

        Twice if its mirror image is in it too.
        """
        dim = matrix.shape[-1]
        top, bottom = self._rows(dim)
        row = torch.arange(matrix.shape[-2], device=matrix.device)[:, None]
        column = torch.arange(dim, device=matrix.device)
        in_a, in_e = column < top, column >= dim - bottom
        inner = ~(in_a | in_e)
        above, below = 2 - in_a.int(), 2 * inner + in_e.int()
        times = torch.where(row < top, above, torch.where(row == top, inner.int(), below))
        own = torch.where(row < top, row, row - (top + 1) + dim - bottom)
        return times, torch.where(row == top, inner, own == column)

    def trace(self, matrix: Tensor) -> Tensor:
        return (matrix * self._places(matrix)[1]).sum((-2, -1))

    def add_to_diagonal_(self, matrix: Tensor, value: float) -> Tensor:
        return matrix.add_(self._places(matrix)[1], alpha=value)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        if self._shape[2]:
            left, right = right, left
        (top, middle, bottom), other = self._parts(left), self._parts(right)
        rows = (self._times(rows, other) for rows in (top, bottom))
        return _joined(next(rows), middle * other.middle, next(rows))

    def apply(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return self._mirrored(matrix, dense) if self._shape[2] else self._plain(matrix, dense)

    def apply_transposed(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return self._plain(matrix, dense) if self._shape[2] else self._mirrored(matrix, dense)

    def _plain(self, matrix: Tensor, dense: Tensor) -> Tensor:
        top, middle, bottom = self._parts(matrix)
        _, inner, _ = self._cut(middle[..., None, :] * dense.mT)
        return torch.cat([top @ dense, inner.mT, bottom @ dense], dim=-2)

    def _mirrored(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return self._times(dense.mT, self._parts(matrix)).mT

    def _times(self, rows: Tensor, parts: _Parts) -> Tensor:
        """Rows (*batch, m, d) times the matrix (not its transpose)."""
        first, _, last = self._cut(rows)
        return first @ parts.top + rows * parts.middle[..., None, :] + last @ parts.bottom

    def gram(self, matrix: Tensor) -> Tensor:
        top, middle, bottom = self._parts(matrix)
        if self._shape[2]:
            mixed = (self._mixed(rows, top, middle, bottom) for rows in (top, bottom))
            return self._projected(next(mixed), middle.square(), next(mixed))
        above, _, below = self._cut(top)
        squares = top.square().sum(-2) + middle.square() + bottom.square().sum(-2)
        below = below.mT @ top + self._cut(bottom)[2].mT @ bottom
        return self._projected(above.mT @ top, squares, below)

    def _mixed(self, rows: Tensor, top: Tensor, middle: Tensor, bottom: Tensor) -> Tensor:
        """Some rows of M, times Mᵀ."""
        _, inner, _ = self._cut(rows * middle[..., None, :])
        return torch.cat([rows @ top.mT, inner, rows @ bottom.mT], dim=-1)

    def project_gram(self, rows: Tensor) -> Tensor:
        first, _, last = self._cut(rows)
        return self._projected(first.mT @ rows, rows.square().sum(-2), last.mT @ rows)

    def _projected(self, above: Tensor, squares: Tensor, below: Tensor) -> Tensor:
        """Π of a symmetric matrix with these first rows, diagonal and last rows."""
        joined = _joined(above, squares, below)
        return joined * self._places(joined)[0]

    def to_dense(self, matrix: Tensor) -> Tensor:
        top, middle, bottom = self._parts(matrix)
        _, inner, _ = self._cut(torch.diag_embed(middle).mT)
        dense = torch.cat([top, inner.mT, bottom], dim=-2)
        return dense.mT if self._shape[2] else dense


def _joined(top: Tensor, middle: Tensor, bottom: Tensor) -> Tensor:
    return torch.cat([top, middle[..., None, :], bottom], dim=-2)


@dataclass(frozen=True)
class Hierarchical(_DenseRows):
    """Dense first and last rows around a diagonal.

    Attributes:
        top: k1, the number of first rows.
        bottom: k2, that of last rows.
    """

    top: int
    bottom: int

    def __post_init__(self) -> None:
        require_integer("top of Hierarchical", self.top, 0)
        require_integer("bottom of Hierarchical", self.bottom, 0)

    @property
    def name(self) -> str:
        return f"hierarchical{self.top}_{self.bottom}"

    @property
    def _shape(self) -> tuple[int, int, bool]:
        return self.top, self.bottom, False


@dataclass(frozen=True)
class Arrow(_DenseRows):
    """A diagonal, and one more dense row or column: a rank-one arrow.

    Attributes:
        triangle: "lower" or "upper": where the dense row or column is.
        diagonal: "top-left" or "bottom-right": where the diagonal is.
    """

    triangle: Literal["lower", "upper"]
    diagonal: Literal["top-left", "bottom-right"]

    def __post_init__(self) -> None:
        choices = {"triangle": TRIANGLES, "diagonal": ("top-left", "bottom-right")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"{name} of Arrow must be one of {list(known)}, got {value!r}")

    @property
    def _shape(self) -> tuple[int, int, bool]:
        below = self.diagonal == "bottom-right"
        return int(below), int(not below), (self.triangle == "lower") == below

    @property
    def name(self) -> str:
        triangle = "tril" if self.triangle == "lower" else "triu"
        return f"{triangle}{self.diagonal.replace('-', '')}diag"
