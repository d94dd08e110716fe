"""Block-diagonal matrices: coordinates are the rows of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tn_kfac.structures.base import Structure, require_integer
from tn_kfac.structures.dense import inverse_cholesky

SHARE, PRODUCTS = 256, 2048
"""The fewest rows of a part, and how many products are enough for a GPU."""


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """Blocks of b×b entries along the diagonal, the last one as large as is left.

    Coordinates are (d, b): row i of the matrix within its block. If b does not divide d, the
    last block's rows end with zeros. A product costs O(d b²), a projection O(d b) a row.

    Attributes:
        size: b.
    """

    invertible: ClassVar[bool] = True

    size: int

    def __post_init__(self) -> None:
        require_integer("size of BlockDiagonal", self.size, 1)

    @property
    def name(self) -> str:
        return f"block{self.size}diagonal"

    def coordinate_shape(self, dim: int) -> tuple[int, ...]:
        return (dim, min(self.size, dim))

    def trace(self, matrix: Tensor) -> Tensor:
        return (matrix * _on_diagonal(matrix)).sum((-2, -1))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        return _rows(_blocks(left) @ _blocks(right), left.shape[-2])

    def apply(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return _rows(_blocks(matrix) @ _blocks(dense, matrix.shape[-1]), dense.shape[-2])

    def apply_transposed(self, matrix: Tensor, dense: Tensor) -> Tensor:
        return _rows(_blocks(matrix).mT @ _blocks(dense, matrix.shape[-1]), dense.shape[-2])

    def gram(self, matrix: Tensor) -> Tensor:
        blocks = _blocks(matrix)
        return _rows(blocks.mT @ blocks, matrix.shape[-2])

    def project_gram(self, rows: Tensor) -> Tensor:
        dim = rows.shape[-1]
        size = min(self.size, dim)
        parts = shares(rows, -(-dim // size))
        if parts > 1:
            columns = _blocks(rows.unflatten(-2, (parts, -1)).mT, size)
            tiles = columns.mT.contiguous()
            return _rows((tiles.mT @ tiles).sum(-4), dim)
        columns = _blocks(rows.mT, size)
        return _rows(columns @ columns.mT, dim)

    def add_to_diagonal_(self, matrix: Tensor, value: float) -> Tensor:
        return matrix.add_(_on_diagonal(matrix), alpha=value)

    def inverse_root(self, matrix: Tensor) -> Tensor:
        dim, size = matrix.shape[-2:]
        blocks = _blocks(matrix)
        if dim % size:  # what fills the last block up shall be invertible too
            filler = torch.arange(size, device=matrix.device) >= dim % size
            blocks = torch.cat(
                [blocks[..., :-1, :, :], blocks[..., -1:, :, :] + filler.diag()], dim=-3
            )
        return _rows(inverse_cholesky(blocks), dim)

    def blocks(self, matrix: Tensor) -> tuple[Tensor, ...]:
        dim, size = matrix.shape[-2:]
        rest = dim % size
        whole = matrix.narrow(-2, 0, dim - rest).unflatten(-2, (-1, size))
        last = matrix.narrow(-2, dim - rest, rest)[..., None, :, :rest]
        return (whole, last) if rest else (whole,)

    def from_blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        size = blocks[0].shape[-1]
        parts = (pad(part, (0, size - part.shape[-1])).flatten(-3, -2) for part in blocks)
        return torch.cat(list(parts), dim=-2)

    def to_dense(self, matrix: Tensor) -> Tensor:
        dim, size = matrix.shape[-2:]
        block = torch.arange(dim, device=matrix.device) // size
        wide = matrix.repeat(*(1 for _ in matrix.shape[:-1]), -(-dim // size))[..., :dim]
        return torch.where(block[:, None] == block, wide, 0)


def shares(rows: Tensor, blocks: int) -> int:
    """Into how many equal parts to cut rows (groups, rows, d), whose grams are then added.

    On a GPU: a product of long, narrow matrices is left to few of its processors.
    """
    groups, count = rows.shape[:2] if rows.dim() == 3 else (1, 1)
    parts = 1
    if rows.is_cuda:
        while (
            count % (2 * parts) == 0
            and count >= 2 * parts * SHARE
            and (groups * blocks * parts < PRODUCTS)
        ):
            parts *= 2
    return parts


def _blocks(rows: Tensor, size: int | None = None) -> Tensor:
    """Rows (*batch, d, m) as blocks (*batch, d / b, b, m), the last one filled up with zeros."""
    dim, size = rows.shape[-2], size or rows.shape[-1]
    missing = -dim % size
    filled = pad(rows, (0, 0, 0, missing)) if missing else rows
    return filled.unflatten(-2, (-1, size))


def _rows(blocks: Tensor, dim: int) -> Tensor:
    """The inverse of `_blocks`."""
    return blocks.flatten(-3, -2).narrow(-2, 0, dim)


def _on_diagonal(matrix: Tensor) -> Tensor:
    """Which coordinates are diagonal entries, (d, b)."""
    dim, size = matrix.shape[-2:]
    row, column = (torch.arange(n, device=matrix.device) for n in (dim, size))
    return (row % size)[:, None] == column
