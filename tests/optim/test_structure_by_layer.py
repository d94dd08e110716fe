"""Structures chosen by layer names."""

import pytest
from optimizers import train, two_layers
from test_update_options import OPTIONS

from tn_kfac import SINGD

STRUCTURES = {
    "1": {"1": "dense", "*": "diagonal"},
    "pairs": {"1": ("dense", "diagonal"), "*": "block3diagonal"},
}


@pytest.mark.parametrize("chosen", STRUCTURES.values(), ids=STRUCTURES)
def test_structure_by_layer(digits, chosen):
    model = two_layers()
    optimizer = SINGD(model, **OPTIONS, structure=chosen)
    train(model, optimizer, digits, range(2))
    first, last = (optimizer.state[model[at].weight] for at in (1, 3))
    assert first["K"].shape == (1, 65, 65)
    assert last["K"].shape == ((1, 7) if chosen["*"] == "diagonal" else (1, 7, 3))
    assert first["C"].shape == ((1, 7, 7) if chosen["1"] == "dense" else (1, 7))
    other = SINGD(two_layers(), **OPTIONS, structure=chosen)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"[KC] of shape|structure="):
        SINGD(two_layers(), **OPTIONS, structure="dense").load_state_dict(optimizer.state_dict())
