"""Runs of scripts/train.py in this process."""

import pytest

from tests.train.common import DIGITS, QUIET


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TN_KFAC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path):
    """Run train.py in this process, into a folder of `tmp_path`; return the exit code."""

    from training.cli import main

    def run(command, *arguments, folder="run", data=DIGITS, print_only=False):
        root = [] if print_only else [f"--trainer.default_root_dir={tmp_path / folder}"]
        return main([command, *QUIET, *data, *root, *arguments])

    return run
