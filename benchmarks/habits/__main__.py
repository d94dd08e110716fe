"""Which training habits hold, for our SINGD and KFAC, the package `singd`, and AdamW.

    python -m benchmarks.habits            # on the CPU, some minutes
    python -m benchmarks.habits --only closure accumul --peers SINGD

Every habit runs for every optimizer in a process of its own, with a time limit. Writes
benchmarks/results/habits.json and habits.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.habits.layers import LAYERS
from benchmarks.habits.models import MODELS
from benchmarks.habits.peers import PEERS, NotApplicable, Peer
from benchmarks.habits.states import STATES
from benchmarks.habits.steps import STEPS
from benchmarks.machine import ROOT, machine, versions

HABITS = STEPS | MODELS | LAYERS | STATES
PACKAGES = ("tn_kfac", "torch", "singd", "lightning", "transformers", "accelerate")
LONGEST_REASON = 90
NOTE = """\
yes: the habit holds. no: it raised, or a comparison failed; the reason is the error's own first
line. SINGD and KFAC are those of tn_kfac, singd is the package. n/a: it has no meaning for that
optimizer. "Equal" always compares an optimizer with itself, run plainly: some steps, mostly in
float64, parameters and state to a relative 1e-7 (to 1e-3 with a GradScaler in float32), or bit by
bit where that is to be expected. Habits are those of torch's documentation: a recipe that only
one optimizer documents does not count. Both SINGDs have the same options (dense, T=1), and layers
that the package supports, except where a habit is about others. Each is a few lines of
benchmarks/habits/."""


def judge(habit: str, peer: Peer, limit: float) -> dict[str, Any]:
    """Run a habit in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(habit, peer, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    verdict, reason = "no", f"time limit of {limit:g} s"
    if receiver.poll(limit):
        try:
            verdict, reason = receiver.recv()
        except EOFError:
            process.join()
            reason = f"the process died ({process.exitcode})"
    process.join(5)
    if process.is_alive() and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own group, with what it started
        process.join()
    seconds = round(time.perf_counter() - start, 2)
    return {
        "habit": habit,
        "optimizer": peer.name,
        "verdict": verdict,
        "reason": reason,
        "seconds": seconds,
    }


def _run(habit: str, peer: Peer, sender: Connection) -> None:
    """In the child: a process group of its own, quiet, one thread, fixed seeds."""
    os.setpgid(0, 0)
    if not os.environ.get("HABITS_VERBOSE"):
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    try:
        HABITS[habit](peer)
        result = ("yes", "")
    except NotApplicable:
        result = ("n/a", "")
    except ModuleNotFoundError as error:
        result = ("n/a", str(error))
    except BaseException as error:
        traceback.print_exc()
        result = ("no", _reason(error))
    sender.send(result)
    sender.close()


def _reason(error: BaseException) -> str:
    """The first line that says something, without the type of a failed comparison."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    if not isinstance(error, AssertionError) or not said:
        where = traceback.extract_tb(error.__traceback__)[-1].name
        said = f"{type(error).__name__} in {where}: {said}"
    text = re.sub(r"\b\d{9,}\b", "(an address)", said)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def markdown(document: dict[str, Any]) -> str:
    """The table, and under which circumstances it holds."""
    cells = {(row["habit"], row["optimizer"]): row for row in document["rows"]}
    habits = list(dict.fromkeys(row["habit"] for row in document["rows"]))
    peers = list(dict.fromkeys(row["optimizer"] for row in document["rows"]))
    known = (f"{name} {version}" for name, version in document["versions"].items() if version)
    count = {p: sum(cells[h, p]["verdict"] == "yes" for h in habits) for p in peers}
    asked = {p: sum(cells[h, p]["verdict"] != "n/a" for h in habits) for p in peers}
    lines = ["# Training habits, CPU", "", NOTE, "", f"{document['machine']['processor']}; "]
    lines[-1] += ", ".join(known) + f"; {document['seconds']:.0f} s."
    lines += ["", "| habit | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
    lines += [f"| {h} | " + " | ".join(_cell(cells[h, p]) for p in peers) + " |" for h in habits]
    lines += ["| **holds** | " + " | ".join(f"{count[p]} of {asked[p]}" for p in peers) + " |"]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    reason = row["reason"].replace("|", "\\|").replace("<", "&lt;")
    return f"{row['verdict']}: {reason}" if reason else row["verdict"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of habits")
    parser.add_argument("--peers", nargs="*", default=[peer.name for peer in PEERS])
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    chosen = [h for h in HABITS if not options.only or any(part in h for part in options.only)]
    facts = {"versions": versions(PACKAGES), "machine": machine("cpu")}
    start, rows = time.perf_counter(), []
    for habit in chosen:
        for peer in (peer for peer in PEERS if peer.name in options.peers):
            rows.append(row := judge(habit, peer, options.limit))
            print(f"{habit:60.60} {peer.name:8} {row['seconds']:6.1f} s  {_cell(row)}", flush=True)
    document = facts | {"seconds": time.perf_counter() - start, "note": NOTE, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "habits.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "habits.md").write_text(markdown(document))


if __name__ == "__main__":
    main()
