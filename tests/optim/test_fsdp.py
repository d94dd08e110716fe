"""Parameters in shards (fully_shard): the ranks together are one process with the whole batch."""

import pytest
from launching import launch


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_is_one_process(tmp_path, ranks):
    """Parameters, factors and momentum; checkpoints; and what is communicated."""
    said = launch("fsdp.py", ranks, tmp_path)
    assert len(said[0]) == {2: 31, 4: 3}[ranks]
    wrong = {
        trial: [found[trial] for found in said]
        for trial in said[0]
        if not all(found[trial] < 1e-10 for found in said)
    }
    assert not wrong
