"""Our projections, and the laws' oracles, are those of the package `singd` 0.0.5."""

import pytest
import torch
from singd.structures.blockdiagonal import BlockDiagonalMatrixTemplate
from singd.structures.dense import DenseMatrix
from singd.structures.diagonal import DiagonalMatrix
from singd.structures.hierarchical import HierarchicalMatrixTemplate
from singd.structures.trilbottomrightdiag import TrilBottomRightDiagonalMatrix
from singd.structures.triltoeplitz import TrilToeplitzMatrix
from singd.structures.triltopleftdiag import TrilTopLeftDiagonalMatrix
from singd.structures.triubottomrightdiag import TriuBottomRightDiagonalMatrix
from singd.structures.triutoeplitz import TriuToeplitzMatrix
from singd.structures.triutopleftdiag import TriuTopLeftDiagonalMatrix
from spaces import DTYPE, SPACES

from tn_kfac.structures import BlockDiagonal, Hierarchical

PEERS = {
    "dense": DenseMatrix,
    "diagonal": DiagonalMatrix,
    "triltoeplitz": TrilToeplitzMatrix,
    "triutoeplitz": TriuToeplitzMatrix,
    "triltopleftdiag": TrilTopLeftDiagonalMatrix,
    "trilbottomrightdiag": TrilBottomRightDiagonalMatrix,
    "triutopleftdiag": TriuTopLeftDiagonalMatrix,
    "triubottomrightdiag": TriuBottomRightDiagonalMatrix,
}


def _peer(spec):
    """The peer's class; theirs with numbers are made by subclassing."""
    if isinstance(spec, BlockDiagonal):
        return type("Blocks", (BlockDiagonalMatrixTemplate,), {"BLOCK_DIM": spec.size})
    if isinstance(spec, Hierarchical):
        numbers = {"MAX_K1": spec.top, "MAX_K2": spec.bottom}
        return type("Hierarchical", (HierarchicalMatrixTemplate,), numbers)
    return PEERS[spec.name]


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("dim", range(1, 10))
def test_projection_of_the_peer(space, dim):
    rows = torch.randn(4, dim, dtype=DTYPE)
    theirs = _peer(space.structure).from_dense(rows.T @ rows).to_dense()
    torch.testing.assert_close(space.project(rows.T @ rows), theirs)
    ours = space.structure.to_dense(space.structure.project_gram(rows[None]))
    torch.testing.assert_close(ours[0], theirs)
