"""Curves of runs, from what scripts/train.py logs."""

import json

import pytest

from benchmarks import logged

LINES = "epoch,step,train/loss,val/top1\n0,9,2.0,\n0,19,1.0,\n0,19,,0.25\n1,29,0.5,\n1,29,,0.75\n"


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(LINES)
    return path


def test_page_and_picture(run, tmp_path):
    output = tmp_path / "runs.json"
    assert logged.main(["Net:", f"SGD={run}", "Other:", f"A={run}", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert list(found) == ["Net", "Other"]
    assert found["Net"]["SGD"]["val/top1"] == [[19.0, 0.25], [29.0, 0.75]]
    assert "| Net | SGD | 30 | 75.00% | 75.00% | 1.167 |" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").stat().st_size > 1000


def test_neighbours_are_averaged():
    assert logged.smooth([[0, 2], [2, 4], [4, 6]], 2) == [[1, 3], [4, 6]]


@pytest.mark.parametrize(
    "words",
    [["SGD={}"], ["{}"], ["Net:"], ["Net:", "SGD={}.none"], ["Net:", "SGD={}.empty"],
     ["Net:", "SGD={}.loss"], ["Net:", "SGD={}.words"]],
)  # fmt: skip
def test_refused(words, run, capsys):
    """Before anything is written."""
    run.with_name("metrics.csv.empty").write_text("epoch,step\n0,1\n")
    run.with_name("metrics.csv.loss").write_text("step,train/loss\n0,1\n")
    run.with_name("metrics.csv.words").write_text("train/loss,val/top1\nno,1\n")
    output = run.with_name("runs.json")
    assert logged.main([*(word.format(run) for word in words), "--output", str(output)]) == 2
    assert not output.exists()
    assert "benchmarks.logged: " in capsys.readouterr().err
