"""Runs training in forked processes and kills them, again and again, until one ends.

As a program (a process of its own, that has run nothing in parallel yet and so may fork):

    python killing.py FOLDER KILLS SEED ARGUMENT...

trains into FOLDER/whole without interruption and into FOLDER/killed with KILLS kills, each
resumed with `--ckpt_path last`, and prints how these came about.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path


def start(arguments, folder, dying_write=0, environment=None):
    """Fork a process that trains; with `dying_write` = n it dies within its n-th checkpoint."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment or {})
    quiet = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    if dying_write:
        _die_in_write(dying_write)
    from training.cli import main

    root = f"--trainer.default_root_dir={folder}"
    os._exit(main([*arguments, root, "--ckpt_path=last"]))


def _die_in_write(number):
    """Let the `number`-th torch.save write half of its bytes, then be killed."""
    import io

    import torch

    save, count = torch.save, 0

    def dying(content, file):
        nonlocal count
        count += 1
        if count < number:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying


def died(child):
    """Wait for a process; whether it was killed. Fails if it ended with an error."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, f"exit code {os.WEXITSTATUS(status)}"
    return False


def main(folder, kills, seed, arguments):
    folder, draw = Path(folder), random.Random(seed)
    begun = time.perf_counter()
    assert not died(start(arguments, folder / "whole"))
    duration, done = time.perf_counter() - begun, 0
    for attempt in range(10 * kills):
        if done == kills:
            break
        writing = attempt % 3 == 2
        child = start(arguments, folder / "killed", draw.randint(1, 2) if writing else 0)
        if not writing:
            time.sleep(draw.uniform(0.1, 0.7) * duration)
            os.kill(child, signal.SIGKILL)
        if died(child):
            done += 1
            when = f"{time.perf_counter() - begun:.1f} s"
            print(f"kill {done} at {when}: {'within a checkpoint' if writing else 'at random'}")
        else:  # it had finished: begin anew
            (folder / "killed" / "checkpoints" / "last.ckpt").unlink()
    assert not died(start(arguments, folder / "killed"))
    print(f"{done} kills")


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401  # before the forks, so that each need not

    import training.cli  # noqa: F401

    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
