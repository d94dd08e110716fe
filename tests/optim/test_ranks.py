"""Data-parallel ranks: together they are one process with the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import cases

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=[2, 3], ids=["equal batches", "uneven batches"])
def ranks(request, tmp_path_factory):
    """What each of the ranks said of every case."""
    meeting = tmp_path_factory.mktemp("ranks") / "store"
    command = [sys.executable, str(HERE / "ranks.py")]
    paths = {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}:{HERE.parent}"}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(request.param), str(meeting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=paths,
        )
        for rank in range(request.param)
    ]
    said = [process.communicate(timeout=500) for process in running]
    assert all(process.returncode == 0 for process in running), said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_ranks_are_one_process(ranks):
    """Parameters and factors, for every optimizer and every case."""
    assert {f"{name}, {case}" for name, case in cases(len(ranks))} == set(ranks[0])
    wrong = {
        case: [found[case] for found in ranks]
        for case in ranks[0]
        if not all(found[case] < 1e-10 for found in ranks)
    }
    assert not wrong
