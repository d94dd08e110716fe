"""Several processes: not served yet, and said so."""

import warnings

import pytest
from optimizers import each_optimizer
from torch import distributed, nn


@each_optimizer
@pytest.mark.parametrize("ranks", [1, 2])
def test_several_processes_are_warned_of(build, ranks, monkeypatch):
    """Their parameters would drift apart; a process group of one is as none."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: ranks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(nn.Linear(2, 2))
    said = [str(entry.message) for entry in caught]
    assert [text.startswith("2 processes train") for text in said] == [True] * (ranks - 1)
