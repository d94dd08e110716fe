"""scripts/train.py: killed at any moment, a run ends with the weights of the whole one."""

import os
import subprocess
import sys

import pytest
import torch

from tests.train.common import QUIET, QUIETLY, ROOT, last

pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = QUIETLY


def killed(tmp_path, kills, seed):
    """Kill a run so many times; whether its final weights are those of an uninterrupted one."""
    config = ROOT / "configs" / "train" / "digits_singd.yaml"
    arguments = ["fit", f"--config={config}", *QUIET, "--model.options={width: 8, dropout: 0.2}"]
    arguments += ["--trainer.max_epochs=2", "--checkpoint.every_n_steps=5", "--model.mixup=0.2"]
    arguments += ["--trainer.num_sanity_val_steps=0", "--trainer.logger=false"]
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "train" / "killing.py",
            tmp_path,
            str(kills),
            str(seed),
            *arguments,
        ],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}:{os.getenv('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills" in done.stdout and "within a checkpoint" in done.stdout
    whole, resumed = (last(tmp_path / name) for name in ("whole", "killed"))
    assert whole["global_step"] == resumed["global_step"] == 2 * (1347 // 64)
    return all(torch.equal(v, resumed["state_dict"][k]) for k, v in whole["state_dict"].items())


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_runs_end_with_the_same_weights(kills, tmp_path):
    assert killed(tmp_path, kills, seed=kills)
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*.part"))
