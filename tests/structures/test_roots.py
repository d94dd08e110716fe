"""Inverse roots and spectral norms of every structure, against dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spaces import SPACES

DTYPE = torch.float64
HAVE_ROOTS = {name: space for name, space in SPACES.items()
              if name.startswith(("dense", "diagonal", "block"))}  # fmt: skip
drawn = {"batch": st.integers(1, 3), "dim": st.integers(1, 9), "seed": st.integers(0, 999)}


def positive(space, batch, dim, seed):
    """Coordinates of a positive matrix, if the structure is one of blocks."""
    rows = torch.randn(batch, dim + 3, dim, generator=torch.Generator().manual_seed(seed),
                       dtype=DTYPE)  # fmt: skip
    return space.structure.add_to_diagonal_(space.structure.project_gram(rows), 0.1)


@pytest.mark.parametrize("space", HAVE_ROOTS.values(), ids=HAVE_ROOTS)
@given(**drawn)
def test_inverse_root(space, batch, dim, seed):
    """R Rᵀ M = I, with R in the space."""
    spec, matrix = space.structure, positive(space, batch, dim, seed)
    root = spec.to_dense(spec.inverse_root(matrix))
    eye = torch.eye(dim, dtype=DTYPE).expand(batch, -1, -1)
    torch.testing.assert_close(root @ root.mT @ spec.to_dense(matrix), eye, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("space", HAVE_ROOTS.values(), ids=HAVE_ROOTS)
@given(**drawn)
def test_blocks(space, batch, dim, seed):
    """Blocks hold all entries, in the order of the rows, and give the matrix back."""
    spec, matrix = space.structure, positive(space, batch, dim, seed)
    blocks = spec.blocks(matrix)
    assert spec.invertible and sum(part.shape[-3] * part.shape[-1] for part in blocks) == dim
    each = [[block for part in blocks for block in part[at]] for at in range(batch)]
    dense = torch.stack([torch.block_diag(*diagonal) for diagonal in each])
    torch.testing.assert_close(dense, spec.to_dense(matrix), rtol=0, atol=0)
    torch.testing.assert_close(spec.from_blocks(blocks), matrix, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("space", HAVE_ROOTS.values(), ids=HAVE_ROOTS)
def test_root_of_what_is_not_positive_is_not_finite(space, dtype):
    """Of that matrix of the batch alone; the dtype is kept."""
    spec = space.structure
    matrix = spec.eye(2, 5, dtype, torch.device("cpu"))
    spec.add_to_diagonal_(matrix[0], -2.0)
    root = spec.inverse_root(matrix)
    assert root.dtype == dtype
    assert not spec.largest(root)[0].isfinite() and spec.largest(root)[1] == 1


def test_other_spaces_have_no_roots():
    assert {name for name, space in SPACES.items() if space.structure.invertible} == set(HAVE_ROOTS)
    others = {name for name, space in SPACES.items()
              if space.structure.inverse_root(space.structure.eye(1, 3, DTYPE, torch.device("cpu")))
              is None}  # fmt: skip
    assert others == set(SPACES) - set(HAVE_ROOTS)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@given(**drawn)
def test_spectral_norm(space, batch, dim, seed):
    """Never more than the largest singular value, and not much less."""
    matrix = positive(space, batch, dim, seed)
    exact = torch.linalg.matrix_norm(space.structure.to_dense(matrix), 2)
    found = space.structure.spectral_norm(matrix, dim)
    assert (found <= exact * (1 + 1e-9)).all()
    assert (found >= 0.5 * exact).all()


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_spectral_norm_of_one_large_direction(space):
    """As a loss spike makes; squares would overflow, in float32."""
    row = torch.randn(1, 1, 40) * 1e15
    matrix = space.structure.project_gram(row)
    exact = torch.linalg.matrix_norm(space.structure.to_dense(matrix).double(), 2)
    found = space.structure.spectral_norm(matrix, 40).double()
    assert found.isfinite().all() and (found >= 0.7 * exact).all()
