"""Every structure takes the steps of the package `singd` 0.0.5, on real digits, in float64.

The package refuses float64 for most of its structures, which the tests allow; and its blocks
take K for Kᵀ (`rmatmat` and `from_inner`), which is right until K is no longer symmetric: there
the package is compared with its transposes put right.
"""

import copy

import pytest
import singd.structures
import torch
from reference.networks import DigitNet
from singd.optim.optimizer import SINGD as PeerSINGD
from singd.structures import (
    blockdiagonal,
    diagonal,
    hierarchical,
    trilbottomrightdiag,
    triltoeplitz,
    triltopleftdiag,
    triubottomrightdiag,
    triutoeplitz,
    triutopleftdiag,
)
from test_singd_trajectory import known
from torch import Tensor, nn

from benchmarks.published import PUBLISHED
from tn_kfac import SINGD

STEPS, BATCH, TOLERANCE = 60, 16, 1e-8
BASE = PUBLISHED | {"lr": 0.02, "damping": 1e-2, "lr_cov": 0.05, "T": 1}
PLAIN = (blockdiagonal, diagonal, hierarchical, triltoeplitz, triutoeplitz)
ARROWS = {
    "triltopleftdiag": triltopleftdiag.TrilTopLeftDiagonalMatrix,
    "trilbottomrightdiag": trilbottomrightdiag.TrilBottomRightDiagonalMatrix,
    "triutopleftdiag": triutopleftdiag.TriuTopLeftDiagonalMatrix,
    "triubottomrightdiag": triubottomrightdiag.TriuBottomRightDiagonalMatrix,
}
BLOCK = PeerSINGD.SUPPORTED_STRUCTURES["block30diagonal"]


class TransposedBlocks(BLOCK):
    """The package's blocks, with Kᵀ where Kᵀ is meant."""

    def rmatmat(self, mat: Tensor) -> Tensor:
        return type(self)(self._blocks.mT, self._last.mT) @ mat

    def from_inner(self, X: Tensor | None = None) -> "TransposedBlocks":
        if X is not None:
            return self.from_mat_inner(self.rmatmat(X))
        return type(self)(self._blocks.mT @ self._blocks, self._last.mT @ self._last)


PEERS = {**PeerSINGD.SUPPORTED_STRUCTURES, **ARROWS, "block30diagonal": TransposedBlocks}


@pytest.fixture(autouse=True)
def peers(monkeypatch):
    """The package with all its structures, in float64."""
    assert singd.structures
    for module in PLAIN:
        if hasattr(module, "lowest_precision"):
            monkeypatch.setattr(module, "lowest_precision", lambda first, *_: first)
    monkeypatch.setattr(PeerSINGD, "SUPPORTED_STRUCTURES", PEERS)


def _train(model, optimizer, data, micro=1):
    images, labels = data
    for step in range(STEPS):
        start = step * BATCH
        optimizer.zero_grad()
        for part in range(micro):
            rows = slice(start + part * BATCH // micro, start + (part + 1) * BATCH // micro)
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows]) / micro
            loss.backward()
        optimizer.step()


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.filterwarnings("ignore:Calling naive implementation")
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", sorted(set(PEERS) - {"dense", "diagonal"}))
def test_equals_singd_package(digits, name, approx):
    """60 steps, parameters and factors; the factors have left the identity."""
    torch.manual_seed(1)
    ours = DigitNet(True).double()
    theirs = copy.deepcopy(ours)
    options = BASE | {"kfac_approx": approx, "structures": (name, name)}
    optimizer, peer = SINGD(ours, **options), PeerSINGD(theirs, **known(options))
    _train(ours, optimizer, digits)
    _train(theirs, peer, digits)
    for (parameter, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert _relative(p.detach(), q.detach()) < TOLERANCE, parameter
    for binding in optimizer._bindings:
        state, recipe = optimizer.state[binding.parameters[0]], binding.tap.recipe
        spaces = {"K": recipe.input_structure, "C": recipe.output_structure}
        for key, expected in (("K", peer.Ks), ("C", peer.Cs)):
            dense = expected[binding.site.name].to_dense()
            assert _relative(spaces[key].to_dense(state[key])[0], dense) < TOLERANCE
            assert _relative(dense, torch.eye(len(dense), dtype=dense.dtype)) > 1e-2


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", sorted(PEERS))
def test_micro_batches_equal_one_batch(digits, name, approx):
    """Four backward passes and one step, for structures that read rows with the current K too."""
    torch.manual_seed(1)
    whole = DigitNet(True).double()
    parts = copy.deepcopy(whole)
    options = BASE | {"kfac_approx": approx, "structure": name, "T": 3}
    _train(whole, SINGD(whole, **options), digits)
    # a quarter of the mean over a quarter is the mean over the whole
    _train(parts, SINGD(parts, **options), digits, micro=4)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
