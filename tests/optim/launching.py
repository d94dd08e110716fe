"""Runs of several processes, each of them a rank."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def launch(script: str, ranks: int, meeting: Path) -> list[Any]:
    """What each rank of `script RANK RANKS MEETING` says, as JSON in its last line."""
    command = [sys.executable, str(HERE / script)]
    paths = {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(meeting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=paths,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=500) for process in running]
    finally:
        for process in running:
            process.kill()  # does nothing to those that have ended
    assert all(process.returncode == 0 for process in running), said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]
