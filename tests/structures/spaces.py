"""Every structure and its dense oracle: a new structure adds one entry to SPACES.

An entry is the structure, Π on dense symmetric matrices (which takes any matrix into the
space), and how its coordinates are read off a dense member of the space.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from reference.singd import projection
from torch import Tensor

from tn_kfac.structures import (
    Arrow,
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    Structure,
    Toeplitz,
)

DTYPE = torch.float64
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


@dataclass(frozen=True)
class Space:
    """A structure and its dense oracle."""

    structure: Structure
    project: Callable[[Tensor], Tensor]
    coordinates: Callable[[Tensor], Tensor]  # of a dense member

    def members(self, batch: tuple[int, ...], dim: int, seed: int, count: int):
        """Random members of the space: [(dense, coordinates)]."""
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        for _ in range(count):
            dense = self.project(torch.randn(*batch, dim, dim, generator=generator, dtype=DTYPE))
            pairs.append((dense, self.coordinates(dense)))
        return pairs

    def check(self, actual: Tensor, dense: Tensor) -> None:
        """Exactly the coordinates of `dense`: where nothing is stored, they are zero."""
        torch.testing.assert_close(actual, self.coordinates(dense), **TIGHT)
        torch.testing.assert_close(self.structure.to_dense(actual), dense, **TIGHT)


def _diagonal_of(dense: Tensor) -> Tensor:
    return dense.diagonal(dim1=-2, dim2=-1).clone()


def _rows_of_blocks(size: int) -> Callable[[Tensor], Tensor]:
    """(d, b): each row within its block."""

    def coordinates(dense: Tensor) -> Tensor:
        dim = dense.shape[-1]
        rows = dense.new_zeros(*dense.shape[:-1], min(size, dim))
        for i in range(dim):
            for j in range(dim):
                if i // size == j // size:
                    rows[..., i, j % size] = dense[..., i, j]
        return rows

    return coordinates


def _rows_and_diagonal(top: int, bottom: int) -> Callable[[Tensor], Tensor]:
    """(k1 + 1 + k2, d): first rows, diagonal between the dense blocks, last rows."""

    def coordinates(dense: Tensor) -> Tensor:
        dim = dense.shape[-1]
        k1 = min(top, dim)
        k2 = min(bottom, dim - k1)
        rows = dense.new_zeros(*dense.shape[:-2], k1 + 1 + k2, dim)
        for i in range(dim):
            if i < k1:
                rows[..., i, :] = dense[..., i, :]
            elif i < dim - k2:
                rows[..., k1, i] = dense[..., i, i]
            else:
                rows[..., k1 + 1 + i - (dim - k2), :] = dense[..., i, :]
        return rows

    return coordinates


def _transposed(coordinates: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda dense: coordinates(dense.mT)


_READERS: dict[Structure, Callable[[Tensor], Tensor]] = {
    Dense(): lambda dense: dense.clone(),
    Diagonal(): _diagonal_of,
    **{BlockDiagonal(b): _rows_of_blocks(b) for b in (1, 2, 3)},
    Toeplitz("lower"): lambda dense: dense[..., :, 0].clone(),
    Toeplitz("upper"): lambda dense: dense[..., 0, :].clone(),
    **{
        Hierarchical(*k): _rows_and_diagonal(*k)
        for k in ((0, 0), (0, 2), (3, 0), (1, 1), (2, 3), (3, 2))
    },
    Arrow("lower", "top-left"): _rows_and_diagonal(0, 1),
    Arrow("lower", "bottom-right"): _transposed(_rows_and_diagonal(1, 0)),
    Arrow("upper", "top-left"): _transposed(_rows_and_diagonal(0, 1)),
    Arrow("upper", "bottom-right"): _rows_and_diagonal(1, 0),
}
SPACES = {s.name: Space(s, projection(s.name), read) for s, read in _READERS.items()}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)

batches = st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)
dims = st.integers(1, 9)
seeds = st.integers(0, 2**16)
