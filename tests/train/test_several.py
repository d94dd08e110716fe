"""scripts/train.py on four ranks, killed, goes on with two or one as if it had never been."""

import os
import subprocess
import sys

import pytest
import torch

from tests.train.common import QUIET, QUIETLY, ROOT, last, logged, optimizer

pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = QUIETLY


@pytest.mark.parametrize("name", ["SINGD", "KFAC"])
def test_four_ranks_killed_go_on_with_fewer(name, tmp_path):
    """In float64 with equal sums in another order; each rank has batch statistics of its own,
    dropout and mixup, so there are none."""
    arguments = ["fit", *QUIET, "--data=Digits", "--model.name=small/mlp", *optimizer(name)]
    arguments += ["--trainer.max_epochs=2", "--trainer.precision=64-true"]
    arguments += ["--trainer.num_sanity_val_steps=0", "--checkpoint.every_n_steps=5"]
    program = [sys.executable, ROOT / "tests" / "train" / "several.py", tmp_path]
    path = f"{ROOT}:{ROOT / 'scripts'}:{os.getenv('PYTHONPATH', '')}"
    done = subprocess.run(
        [*program, "8", *arguments],  # written after 5, 10, 15, 20, 21 (twice), 25, 30 steps
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    killed, whole = (last(tmp_path / folder) for folder in ("killed", "whole"))
    assert killed["global_step"] == 25 and whole["global_step"] == 42
    assert len(list((tmp_path / "killed" / "checkpoints").glob(".last.ckpt.*.part"))) == 1
    for folder in ("on2", "on1"):
        resumed = last(tmp_path / folder)
        assert resumed["global_step"] == 42
        assert not list((tmp_path / folder / "checkpoints").glob(".*.part"))
        for key, value in whole["state_dict"].items():
            torch.testing.assert_close(resumed["state_dict"][key], value, rtol=0, atol=1e-12)
        losses = (logged(tmp_path / run)["val/loss"][-1] for run in ("whole", folder))
        assert next(losses) == pytest.approx(next(losses), rel=1e-6)
