"""Trains on several ranks, which are killed while rank 0 writes; goes on with fewer of them.

As a program (that may fork, see killing.py):

    python several.py FOLDER WRITE ARGUMENT...

trains into FOLDER/whole on one rank, and into FOLDER/run on four until the WRITE-th checkpoint,
in the midst of which all are killed: FOLDER/killed. From there it goes on on two ranks and on one:
FOLDER/on2 and FOLDER/on1.
"""

import os
import shutil
import signal
import socket
import sys
from pathlib import Path

from killing import died, start


def ranks(number, arguments, folder, dying_write=0):
    """Train on so many ranks, as torchrun starts them; whether they were killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    shared |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}
    options = ["--trainer.strategy=ddp", f"--trainer.devices={number}"] if number > 1 else []
    children = [
        start(
            [*arguments, *options],
            folder,
            dying_write if rank == 0 else 0,
            shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {},
        )
        for rank in range(number)
    ]
    if not dying_write:
        return any([died(child) for child in children])
    killed = died(children[0])
    for child in children[1:]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return killed


def main(folder, write, arguments):
    folder = Path(folder)
    assert not ranks(1, arguments, folder / "whole")
    assert ranks(4, arguments, folder / "run", write)
    (folder / "run").rename(folder / "killed")
    for number in (2, 1):
        shutil.copytree(folder / "killed", folder / "run")
        assert not ranks(number, arguments, folder / "run")
        (folder / "run").rename(folder / f"on{number}")


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  # before the forks, so that each need not

    import training.cli  # noqa: F401

    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
