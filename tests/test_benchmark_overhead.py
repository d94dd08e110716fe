"""The benchmark of overhead: it times warm caches, and records torch calls alone."""

import json

import pytest
import torch

from benchmarks import overhead

OPERATIONS = overhead.operations("cpu")


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_cache_is_missed_in_a_second_call(name):
    assert overhead.measure(OPERATIONS[name], calls=1, repeats=1)["misses"] == 0


def test_calls_that_return_tensors_are_recorded_and_replayed():
    x = torch.ones(2)
    with overhead.Recorder() as recorder:
        assert x.shape == (2,) and not x.is_cuda
        torch.einsum("a,a->", x, x)
        x.mul_(2)
    assert [func.__name__ for func, *_ in recorder.calls] == ["einsum", "mul_"]
    recorder.replay()
    assert x.tolist() == [4, 4]


def test_run(tmp_path, monkeypatch):
    few = ("functional.unfold", "kfac_reduce")
    monkeypatch.setattr(overhead, "operations", lambda _: {name: OPERATIONS[name] for name in few})
    monkeypatch.setattr(overhead, "LIMIT", 1.0)
    path = tmp_path / "overhead.json"
    assert overhead.main(["--calls=1", "--repeats=1", f"--output={path}"]) == 0
    assert [row["operation"] for row in json.loads(path.read_text())["rows"]] == list(few)
    assert path.with_suffix(".md").read_text().count("\n| kfac_reduce |") == 1
