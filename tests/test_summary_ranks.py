"""What many ranks would take; that real ones do is in tests/optim/test_sharing.py."""

import pytest
import torch
from torch import nn

from tn_kfac import KFAC, SINGD, rank_costs


def layers() -> nn.Module:
    """Two layers, with and without a bias."""
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))


def test_one_rank_sends_nothing():
    """Factors (7, 4) and (4, 2): averages, eigenvalues and eigenvectors in float32."""
    found = rank_costs(KFAC(layers()), 1)
    assert found.statistics_bytes == found.broadcast_bytes == 0
    assert found.factor_bytes == 4 * (49 + 16 + 16 + 4) + 2 * 4  # two weights of averages
    assert found.owned_bytes == 4 * (49 + 16 + 16 + 4 + 7 + 4 + 4 + 2)
    assert found.owned_flops == 9 * (7**3 + 4**3 + 4**3 + 2**3)
    assert found.owned_share == 1.0


def test_shares_of_two_ranks():
    """The largest factor is one rank's, the others are the other's; in turn, with intervals."""
    found = rank_costs(KFAC(layers(), T=2, T_inverse=10), 2)
    numbers = 49 + 16 + 16 + 4 + 2 * 2  # two counts a layer
    assert found.statistics_bytes == 4 * numbers
    assert found.statistics_bytes_per_step == 2 * numbers
    assert found.broadcast_bytes == found.owned_bytes
    assert found.broadcast_bytes_per_step == pytest.approx(found.owned_bytes / 10)
    assert found.owned_share == pytest.approx(7**3 / (7**3 + 2 * 4**3 + 2**3))


@pytest.mark.parametrize(
    ("dtype", "size", "of_counts"),
    [(None, 4, 4), (torch.bfloat16, 2, 4), (torch.float32, 4, 4), (torch.float64, 8, 8)],
)
def test_sums_in_another_dtype(dtype, size, of_counts):
    """But for counts, which bfloat16 would round."""
    found = rank_costs(KFAC(layers(), T=2, reduce_dtype=dtype), 2)
    assert found.statistics_bytes == size * (49 + 16 + 16 + 4) + of_counts * 2 * 2
    assert found.statistics_bytes_per_step == found.statistics_bytes / 2
    assert found.factor_bytes == rank_costs(KFAC(layers()), 2).factor_bytes


def test_owners_send_gradients():
    """Each rank keeps its layers' inverses, and sends their preconditioned gradients each step."""
    found = rank_costs(KFAC(layers(), share_inverses="gradients", T_inverse=10), 2)
    assert found.owned_bytes == 4 * (49 + 16 + 7 + 4)
    assert found.broadcast_bytes == found.broadcast_bytes_per_step == 4 * (4 * 7 + 2 * 4)


@pytest.mark.parametrize("structure", ["diagonal", "dense"])
def test_singd_has_no_inverses(structure):
    """On the meta device, without any data; T may be a schedule."""
    with torch.device("meta"):
        optimizer = SINGD(layers(), structure=structure, T=lambda step: 4)
    found = rank_costs(optimizer, 1024)
    size = 7 + 4 + 4 + 2 if structure == "diagonal" else 49 + 16 + 16 + 4
    assert found.factor_bytes == 2 * 4 * size
    assert found.statistics_bytes == 4 * (size + 4)
    assert found.statistics_bytes_per_step == size + 4
    assert found.owned_bytes == 0
    if structure == "diagonal":
        assert found.broadcast_bytes == found.owned_flops == found.owned_share == 0
    else:
        assert found.broadcast_bytes == 4 * found.broadcast_bytes_per_step == found.factor_bytes
        assert found.owned_flops == 2 * 4 * (7**3 + 4**3)  # of the first layer: four products


@pytest.mark.parametrize(
    ("options", "sent", "flops"),
    [
        ({"structure": "dense", "share_updates": False}, 0, 2 * 4 * (7**3 + 2 * 4**3 + 2**3)),
        ({"structure": "dense", "kfac_like": True}, 4 * 85, 2 * 4 * (7**3 + 4**3)),
        ({"structure": "block2diagonal"}, 2 * 4 * 2 * 17, 2 * 2 * 4 * (7 + 4)),
        ({"structure": {"0": "dense", "*": "diagonal"}}, 2 * 4 * 65, 2 * 4 * (7**3 + 4**3)),
    ],
)
def test_updates_are_shared(options, sent, flops):
    """Factors and momenta of layers that are not diagonal, from whom the most costs to all."""
    found = rank_costs(SINGD(layers(), **options), 2)
    assert (found.broadcast_bytes, found.owned_flops) == (sent, flops)
    everything = rank_costs(SINGD(layers(), **options), 1)
    assert everything.broadcast_bytes == 0 and everything.owned_share == 1.0
    assert found.owned_share == flops / everything.owned_flops
    assert found.factor_bytes == everything.factor_bytes


@pytest.mark.parametrize(("ranks", "error"), [(0, ValueError), (2.0, TypeError)])
def test_refused(ranks, error):
    """A number of ranks is a positive integer."""
    with pytest.raises(error, match="world_size"):
        rank_costs(SINGD(layers()), ranks)


def test_refused_optimizer():
    """Other optimizers have no factors."""
    with pytest.raises(TypeError, match="got SGD"):
        rank_costs(torch.optim.SGD(layers().parameters()), 2)
