"""Curvature that is summed over ranks in another dtype than its own (`reduce_dtype`)."""

import pytest
import torch
from launching import launch
from optimizers import loss_of, two_layers

from tn_kfac import KFAC, SINGD


def test_sums_are_one_process(tmp_path):
    """Factors, up to rounding; counts, exactly; and the messages."""
    said = launch("reducing.py", 2, tmp_path)
    assert len(said[0]) == 28
    wrong = {
        trial: [found[trial] for found in said]
        for trial in said[0]
        if not all(found[trial] <= 1.0 for found in said)
    }
    assert not wrong


@pytest.mark.parametrize("kind", [SINGD, KFAC])
def test_one_process_rounds_nothing(digits, kind):
    """Bit for bit what it does without; and checkpoints do not know of it."""
    runs, states = [], []
    for dtype in (None, torch.bfloat16):
        model = two_layers()
        optimizer = kind(model, structure="dense", reduce_dtype=dtype)
        loss_of(model, digits, 0).backward()
        optimizer.step()
        runs.append([*model.parameters()])
        states.append(optimizer.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert "reduce_dtype" not in states[1]["param_groups"][0]


@pytest.mark.parametrize("kind", [SINGD, KFAC])
def test_float16_refused(kind):
    """With what to choose instead."""
    with pytest.raises(ValueError, match=r"reduce_dtype=torch.float16 .*: choose torch.bfloat16"):
        kind(two_layers(), reduce_dtype=torch.float16)
