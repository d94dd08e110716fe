"""Data-parallel ranks: together they are one process with the whole batch."""

import pytest
from launching import launch, over
from ranks import cases


@pytest.fixture(scope="module", params=over((2, "gloo"), (3, "gloo"), (2, "nccl")))
def ranks(request, tmp_path_factory):
    """What each of the ranks said of every case: two with equal batches, three with uneven ones."""
    count, network = request.param
    return launch("ranks.py", count, tmp_path_factory.mktemp("ranks") / "store", network)


def test_ranks_are_one_process(ranks):
    """Parameters and factors, for every optimizer and every case."""
    assert {f"{name}, {case}" for name, case in cases(len(ranks))} == set(ranks[0])
    wrong = {
        case: [found[case] for found in ranks]
        for case in ranks[0]
        if not all(found[case] < 1e-10 for found in ranks)
    }
    assert not wrong
