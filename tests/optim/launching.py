"""Runs of several processes, each of them a rank: gloo's on the CPU, or NCCL's with a GPU each."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

HERE = Path(__file__).parent
NETWORK = "TN_KFAC_TEST_NETWORK"


def over(*cases: tuple[int, str]) -> list[Any]:
    """Parameters of a test: (ranks, network), skipped where there are too few GPUs."""
    few = torch.cuda.device_count()
    return [
        pytest.param(
            (ranks, network),
            id=f"{ranks} {network}",
            marks=pytest.mark.skipif(
                network == "nccl" and few < ranks, reason=f"needs {ranks} GPUs, here are {few}"
            ),
        )
        for ranks, network in cases
    ]


def launch(script: str, ranks: int, meeting: Path, network: str = "gloo") -> list[Any]:
    """What each rank of `script RANK RANKS MEETING` says, as JSON in its last line."""
    command = [sys.executable, str(HERE / script)]
    paths = {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"}
    if network == "nccl":
        known = os.environ.get("PYTHONPATH", "")
        paths = os.environ | paths | {"PYTHONPATH": f"{paths['PYTHONPATH']}:{known}"}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(meeting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=paths | {NETWORK: network},
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


def begin(rank: int, ranks: int, store: str | Path) -> None:
    """Join the other ranks; all tensors are on this rank's device from now on."""
    torch.set_num_threads(1)
    network = os.environ[NETWORK]
    if network == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    distributed.init_process_group(
        network, init_method=f"file://{store}", rank=rank, world_size=ranks
    )


def here(tensor: Tensor) -> Tensor:
    """On this rank's device."""
    return tensor.to(torch.get_default_device())


def as_rank(trials: Callable[[int, int, Path], Mapping[str, Callable[[], Any]]]) -> None:
    """Be the rank that `launch` asks for (MEETING is a folder), and say what each trial found."""
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    begin(rank, ranks, folder / "store")
    print(json.dumps({name: trial() for name, trial in trials(rank, ranks, folder).items()}))
    gc.collect()  # models and optimizers that hold on to the group, whose threads end with it
    distributed.destroy_process_group()
