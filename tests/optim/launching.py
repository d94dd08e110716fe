"""Runs of several processes, each of them a rank."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

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


def as_rank(trials: Callable[[int, int, Path], Mapping[str, Callable[[], Any]]]) -> None:
    """Be the rank that `launch` asks for (MEETING is a folder), and say what each trial found."""
    torch.set_num_threads(1)
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks
    )
    print(json.dumps({name: trial() for name, trial in trials(rank, ranks, folder).items()}))
    gc.collect()  # models and optimizers that hold on to the group, whose threads end with it
    distributed.destroy_process_group()
