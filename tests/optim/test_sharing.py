"""Work shared out over ranks by cost: the same steps as one process makes."""

import pytest
import torch
from launching import launch, over
from optimizers import two_layers
from torch import nn

from tn_kfac import KFAC, SINGD
from tn_kfac.optim.owners import owners


@pytest.mark.parametrize("given", over((2, "gloo"), (4, "gloo"), (2, "nccl"), (4, "nccl")))
def test_shared_is_one_process(tmp_path, given):
    """Parameters, for all ways of sharing; who computes and keeps what; messages; resumed runs."""
    ranks, network = given
    said = launch("sharing.py", ranks, tmp_path, network)
    assert len(said[0]) == {2: 66, 4: 10}[ranks]
    wrong = {
        trial: [found[trial] for found in said]
        for trial in said[0]
        if not all(found[trial] < 1e-10 for found in said)
    }
    assert not wrong


def test_owners_by_cost():
    """The most expensive first, to who has least; what costs nothing is everybody's."""
    loads = [0, 3]
    assert owners([1, 0, 8, 5, 4], loads) == [1, None, 0, 1, 0]
    assert loads == [12, 9]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (KFAC, {"share_inverses": False}),
        (KFAC, {"share_inverses": "inverses"}),
        (KFAC, {"share_inverses": "gradients"}),
        (SINGD, {"share_updates": False}),
        (SINGD, {"share_updates": "factors"}),
        (SINGD, {"share_updates": "gradients"}),
    ],
)
def test_one_process_shares_nothing(digits, kind, options):
    """Bit for bit what it does without."""
    runs = []
    for given in ({}, options):
        model = two_layers()
        optimizer = kind(model, structure="dense", **given)
        nn.functional.cross_entropy(model(digits[0][:8]), digits[1][:8]).backward()
        optimizer.step()
        runs.append([*model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "options", [{"ekfac": "ema"}, {"ekfac": "exact"}, {"lag": 1}, {"share_inverses": True}]
)
def test_inverses_refused(options):
    """What needs all inverses on all ranks."""
    with pytest.raises(ValueError, match="share_inverses"):
        KFAC(two_layers(), **({"share_inverses": "gradients"} | options))


@pytest.mark.parametrize("structure", ["block2diagonal", ("dense", "triltoeplitz"), "auto1000"])
def test_factors_refused(structure):
    """Structures that read rows need all factors on all ranks."""
    with pytest.raises(ValueError, match=r"share_updates='gradients'.*layer '1'.*structure='"):
        SINGD(two_layers(), structure=structure, share_updates="gradients")
