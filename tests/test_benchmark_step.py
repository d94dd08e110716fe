"""The benchmark of whole steps: what it measures, what it compares, and the page made from it."""

import json

import pytest
import torch

from benchmarks.step import __main__ as command
from benchmarks.step import intervals, measuring, profiles
from benchmarks.step.measuring import Plan, baseline, cell, fastest
from benchmarks.step.optimizers import (
    OPTIMIZERS,
    SGD,
    Entry,
    _tensor_networks,
    _unfolded,
    state_bytes,
)
from benchmarks.step.report import page, ratio
from benchmarks.step.training import NETWORKS, Training

pytestmark = pytest.mark.filterwarnings("ignore:.*:SyntaxWarning")  # of einconv


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """A tiny model leaves little, and collecting garbage takes longer than its steps."""
    monkeypatch.setattr(measuring, "release", lambda: None)


def run(path, *arguments, code=0):
    asked = ["--quick", "--device=cpu", "--modes", "fp32", f"--output={path}", *arguments]
    assert command.main(asked) == code
    return json.loads(path.read_text())


def test_run_from_beginning_to_end(tmp_path, capsys):
    path = tmp_path / "step.json"
    asked = ["AdamW", "SINGD", "SINGD dense T=10", "KFAC 1/10", "singd unfold", "singd TN"]
    rows = run(path, "--optimizers", *reversed(asked))["rows"]
    assert [row["optimizer"] for row in rows] == [*SGD, *asked]
    for row in rows:
        assert row["status"] == "ok", row
        assert 0 < row["low"] <= row["high"] and row["seconds"] > 0 and row["issue_seconds"] > 0
        assert row["state_bytes"] > 0 and row["bytes"] is None and "samples" not in row
        assert row["sgd"]["kind"] in SGD and row["sgd"]["drift"] is not None
    steps = {row["optimizer"]: (row["steps"], row["statistic"]) for row in rows}
    assert steps["SINGD"] == (5, "median") and steps["SINGD dense T=10"] == (10, "mean")
    text = path.with_suffix(".md").read_text()
    assert all(text.count(f"\n| {name} | ") == 2 for name in (*SGD, *asked))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err.count("tiny          fp32") == len(rows)


def test_rows_are_replaced_by_key_and_the_page_is_made_anew(tmp_path):
    path = tmp_path / "step.json"
    few = ["--no-plots", "--optimizers", "AdamW", "SINGD"]
    before = run(path, *few, "--batch=3")["rows"]
    after = run(path, "--no-plots", "--optimizers", "SINGD")["rows"]
    assert [row["optimizer"] for row in after] == [*SGD, "AdamW", "SINGD"]
    assert [row["batch"] for row in after] == [4, 4, 3, 4]
    assert after[2] == before[2]
    path.with_suffix(".md").unlink()
    assert command.main(["--report", "--no-plots", f"--output={path}"]) == 0
    assert "| AdamW | " in path.with_suffix(".md").read_text()
    assert not path.with_suffix(".png").exists()


def test_no_time_is_left(tmp_path, capsys):
    path = tmp_path / "step.json"
    assert run(path, "--no-plots", "--max-seconds=1e-9", code=1)["rows"] == []
    assert "Incomplete" in capsys.readouterr().err


def test_profiles_are_shown(tmp_path, capsys):
    path = tmp_path / "step.json"
    asked = ["--no-plots", "--profile", "--cpu-profile", "--optimizers", "SINGD"]
    row = run(path, *asked)["rows"][-1]
    assert row["profile"]["steps"] == 3 and row["profile"]["launches"] > 10
    assert 0 < row["profile"]["busy_seconds"] < 10 and len(row["profile"]["kernels"]) == 40
    assert "cpu_profile" not in row and "0.00" not in str(ratio(row, "launches"))
    said = capsys.readouterr().out
    assert "tiny fp32 SINGD: 5 steps" in said and "aten::" in said
    text = (tmp_path / "step-tiny-fp32-SINGD.cprofile.txt").read_text()
    assert "Ordered by: cumulative time" in text and "Ordered by: internal time" in text


def test_what_fails_is_a_row(tmp_path, monkeypatch):
    def absent(model):
        raise ModuleNotFoundError("No module named 'singd'", name="singd")

    def failing(model):
        raise RuntimeError("no such thing\nand more")

    def full(model):
        raise torch.OutOfMemoryError("CUDA out of memory")

    builders = {"singd TN": absent, "AdamW": failing, "KFAC 1/10": full}
    for name, build in builders.items():
        monkeypatch.setitem(OPTIMIZERS, name, Entry(build))
    path = tmp_path / "step.json"
    document = run(path, "--no-plots", "--optimizers", *builders, "SINGD")
    found = {row["optimizer"]: row["status"] for row in document["rows"]}
    assert found == {
        "SGD foreach": "ok", "SGD fused": "ok", "SINGD": "ok", "singd TN": "absent: singd",
        "AdamW": "failed: RuntimeError: no such thing", "KFAC 1/10": "failed: out of memory",
    }  # fmt: skip
    text = path.with_suffix(".md").read_text()
    assert "| AdamW | failed: RuntimeError |" in text and "| singd TN | absent: singd |" in text
    assert "- tiny, AdamW: failed: RuntimeError: no such thing" in text
    for name in SGD:
        monkeypatch.setitem(OPTIMIZERS, name, Entry(failing))
    document = run(tmp_path / "alone.json", "--no-plots", "--optimizers", "SINGD")
    assert [row["status"] == "ok" for row in document["rows"]] == [False, False, True]
    assert document["rows"][-1]["sgd"] is None


def made_up(name, seconds, **more):
    row = {
        "model": "resnet18", "mode": "amp", "optimizer": name, "status": "ok", "seconds": seconds,
        "issue_seconds": seconds / 2, "bytes": 3 * 2**30, "state_bytes": 2**21, "batch": 8,
        "pixels": 64, "commit": "c",
    }  # fmt: skip
    return row | more


def test_ratios_are_to_the_faster_sgd_before_and_after():
    summary = {"busy_seconds": 0.04, "launches": 200.0}
    slow = made_up("SGD foreach", 0.2)
    fast = made_up("SGD fused", 0.1, samples=[0.09, 0.1, 0.11], profile=summary)
    failed = made_up("AdamW", 0.0) | {"status": "failed: RuntimeError: x"}
    assert fastest([slow, fast, failed]) is fast and fastest([failed]) is None
    again = made_up("SGD fused", 0.13, samples=[0.12, 0.13, 0.14])
    sgd = baseline("SGD fused", fast, again)
    assert sgd["seconds"] == pytest.approx(0.115) and sgd["drift"] == pytest.approx(0.3)
    assert baseline("SGD fused", fast, None)["seconds"] == 0.1
    assert baseline("SGD fused", fast, failed)["drift"] is None
    ours = made_up("SINGD", 0.1725, bytes=6 * 2**30, sgd=sgd)
    ours["profile"] = {"busy_seconds": 0.06, "launches": 321.0}
    assert ratio(ours) == pytest.approx(1.5) and ratio(ours, "bytes") == 2
    assert ratio(ours, "busy_seconds") == pytest.approx(1.5) and ratio(fast) is None
    settings = {"steps": "30", "warmup": "10", "average": "100"}
    text = page({"rows": [ours], "versions": {}, "machine": {"gpu": "G"}, "settings": settings})
    assert "| **SGD** | 115 ms / 3.00 GiB |" in text and "| SINGD | 1.50x / 2.00x |" in text
    assert "| **SGD** | 57.5 ms / 200 / 40 ms / 2 |" in text
    assert "| SINGD | 1.50x / 321 / 1.50x / 2 |" in text and "+30.0% (SGD fused)" in text


def test_summary_of_kernels():
    def event(name, start, duration, cat="kernel"):
        return {"name": name, "cat": cat, "ts": start, "dur": duration}

    events = [
        event("a", 0, 10), event("b", 5, 10), event("a", 20.5, 4), event("c", 40, 6, "gpu_memcpy"),
        event("aten::mm", 0, 1000, "cpu_op"), {"name": "thread_name", "ph": "M"},
    ]  # fmt: skip
    found = profiles.summary(events, 2, profiles.BUSY["cuda"])
    assert found["busy_seconds"] == pytest.approx(12.5e-6) and found["launches"] == 1.5
    assert found["kernels"] == [["a", 1.0, 7.0], ["b", 0.5, 5.0], ["c", 0.5, 3.0]]
    assert profiles.covered([(3, 4), (0, 10), (12, 13), (2, 11)]) == 12


@pytest.mark.parametrize("mode", ["fp32", "amp"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps(name, mode):
    training = Training(NETWORKS["tiny"], mode, OPTIMIZERS[name].build, "cpu")
    before = [p.detach().clone() for p in training.model.parameters()]
    for _ in range(3):
        training()
    for old, new in zip(before, training.model.parameters(), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)
    least = sum(p.nbytes for p in training.model.parameters())
    assert state_bytes(training.optimizer) >= least


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_whole_periods(name):
    entry = OPTIMIZERS[name]
    assert entry.period % entry.T == 0
    for wanted in (1, 10, 30, 101):
        assert wanted <= entry.whole(wanted) < wanted + entry.period
        assert entry.whole(wanted) % entry.period == 0
        assert entry.warmup(wanted) >= max(wanted, 2 * entry.T)


def test_the_package_unfolded_is_the_package():
    pytest.importorskip("singd")
    x = torch.randn(2, 4, 9, 8)
    given = ((3, 2), (2, 1), (1, 0), (1, 2), 2)
    torch.testing.assert_close(_unfolded(x, *given), _tensor_networks()(x, *given))


def test_graphs_are_for_gpus_and_steps_that_are_alike():
    rows = [
        cell(NETWORKS["tiny"], "graph", OPTIMIZERS[name], Plan(device))
        for name, device in (("SINGD", "cpu"), ("KFAC 10/100", "cuda"))
    ]
    assert [row["status"].partition(":")[0] for row in rows] == ["absent", "absent"]


def test_later_inverses_of_newton_schulz_have_a_time_of_their_own():
    row = {"plain": 1.0, "factors": 3.0, "inverses": 5.0}
    assert intervals.average(row, 1, 1) == 5.0
    assert intervals.average(row, 10, 100) == pytest.approx(1.0 + 0.2 + 0.02)
    row["later inverses"] = 13.0
    assert intervals.average(row, 1, 1) == 5.0
    assert intervals.average(row, 10, 100) == pytest.approx(1.0 + 0.2 + 0.1)
