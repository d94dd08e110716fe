"""Kernels run on a GPU, or on a CPU in Triton's interpreter, which a process of its own has on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ON = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not ON else "cpu"
WHY = "needs a GPU, or TRITON_INTERPRET=1 from the start"
needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not ON, reason=WHY)


def run_interpreted(file: str) -> None:
    """Run the tests of a file that need kernels in the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # the latter refuses xdist
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-rs", *plugins, "-n", "0",
         "-k", "not interpreter and not compiles", file],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=400,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout, done.stdout
    assert WHY not in done.stdout, done.stdout  # nothing that needs kernels was skipped


def run_script(script: str) -> None:
    """Run a script that says "done" as its last word, without the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
        timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("done")
