"""Parameters in shards (fully_shard): the ranks together are one process with the whole batch."""

import pytest
from launching import launch, over


@pytest.mark.parametrize("given", over((2, "gloo"), (4, "gloo"), (2, "nccl"), (4, "nccl")))
def test_sharded_is_one_process(tmp_path, given):
    """Parameters, factors and momentum; checkpoints; and what is communicated."""
    ranks, network = given
    said = launch("fsdp.py", ranks, tmp_path, network)
    assert len(said[0]) == {2: 38, 4: 5}[ranks]
    wrong = {
        trial: [found[trial] for found in said]
        for trial in said[0]
        if not all(found[trial] < 1e-10 for found in said)
    }
    assert not wrong
