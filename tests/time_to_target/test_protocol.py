"""What is run, in which order, and what is resumed."""

import json
from dataclasses import replace

import pytest

from benchmarks.time_to_target import __main__ as command
from benchmarks.time_to_target import protocol, targets
from benchmarks.time_to_target.optimizers import OPTIMIZERS, Entry
from benchmarks.time_to_target.protocol import Session
from benchmarks.time_to_target.spaces import SGD

INFINITE = float("inf")


def read(tmp_path):
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def test_run_from_beginning_to_end(tmp_path, asked, capsys):
    names = ["SGD", "AdamW", "SINGD diagonal"]
    assert command.main([*asked, "--optimizers", *names]) == 0
    rows = read(tmp_path)
    kinds = {(row["kind"], row["optimizer"]) for row in rows}
    assert {("reference trial", "SGD"), ("reference", "AdamW")} < kinds
    assert {(kind, name) for kind in ("trial", "final", "untuned") for name in names} < kinds
    tried = [(r["optimizer"], r["kind"], r["trial"]) for r in rows if r["kind"].endswith("trial")]
    assert len(set(tried)) == 2 * 3 + 3 * 3
    assert len(rows) == len(tried) + 2 * 2 + 3 * (2 + 2)
    fixed = json.loads((tmp_path / "targets.json").read_text())["small"]["tiny"]
    assert fixed["target"] == fixed["final"][fixed["from"]][-1]
    assert fixed["medians"][fixed["from"]] == min(fixed["medians"].values())
    for row in rows:
        assert row["status"] == "ok" and row["data"] and row["torch"]
        steps, seconds, _, metrics = zip(*row["curve"], strict=True)
        assert list(seconds) == sorted(seconds) and steps[-1] == row["steps"]
        assert all(metric > (row["target"] or 0) for metric in metrics[:-1])
    tuning = {row["seed"] for row in rows if row["kind"].endswith("trial")}
    reference = {row["seed"] for row in rows if row["kind"] == "reference"}
    final = {row["seed"] for row in rows if row["kind"] in ("final", "untuned")}
    assert not (tuning & reference or tuning & final or reference & final)
    for seed in final:  # one start for all
        assert len({row["curve"][0][2] for row in rows if row["seed"] == seed}) == 1
    text = (tmp_path / "rows.md").read_text()
    assert all(f"| **{name}** | " in text or f"| {name} | " in text for name in names)
    for kind in ("profile", "curves"):
        assert (tmp_path / f"rows-{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert f"![rows-{kind}.png](rows-{kind}.png)" in text
    assert capsys.readouterr().err.count("\n") == len(rows)


def test_what_is_on_file_is_not_run_again(tmp_path, asked, capsys):
    names = ["--optimizers", "SGD", "AdamW"]
    assert command.main([*asked, *names]) == 0
    path = tmp_path / "rows.jsonl"
    whole = path.read_text()
    assert command.main([*asked, *names]) == 0 and path.read_text() == whole
    identities = [(r["kind"], r["optimizer"], r.get("trial"), r["seed"]) for r in read(tmp_path)]
    fixed = (tmp_path / "targets.json").read_text()
    lines = whole.splitlines(keepends=True)
    kept = "".join(lines[:13]) + lines[13][:40]  # cut short in the middle of tuning
    path.write_text(kept)
    assert command.main([*asked, *names, "--max-seconds=-1"]) == 1
    assert path.read_text() == kept and "Incomplete" in capsys.readouterr().err
    assert command.main([*asked, *names]) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()[14:]]
    again = [(r["kind"], r["optimizer"], r.get("trial"), r["seed"]) for r in again]
    assert again == identities[13:]
    assert (tmp_path / "targets.json").read_text() == fixed


def test_targets_come_first_and_do_not_move(tmp_path, asked):
    few = [*asked, "--optimizers", "SINGD diagonal"]
    assert command.main([*few, "--phases", "tune", "final"]) == 1  # no target yet
    assert not (tmp_path / "rows.jsonl").exists()
    assert command.main([*few, "--phases", "reference"]) == 0
    assert {row["optimizer"] for row in read(tmp_path)} == {"SGD", "AdamW"}
    rows = [{"curve": [], "seed": 0}]
    with pytest.raises(ValueError, match="has a target: remove it"):
        targets.fix("small", "tiny", {"SGD": rows}, {}, tmp_path / "targets.json")


def test_processes_tune_at_once(tmp_path, asked, monkeypatch):
    ran = []

    class Pool:
        def __init__(self, processes, context):
            assert processes == 2 and context.get_start_method() == "spawn"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            ran.append("end")

        def submit(self, work, phase, workload, name, plan, threads):
            ran.append((phase, name))
            late = work(phase, workload, name, plan, threads)
            return type("Done", (), {"result": lambda self: late})()

    monkeypatch.setattr(command, "ProcessPoolExecutor", Pool)
    assert command.main([*asked, "--processes=2", "--optimizers", "SGD", "Muon"]) == 0
    assert ran == [
        ("reference", "SGD"), ("reference", "AdamW"), "end", ("tune", "SGD"), ("tune", "Muon"),
        "end",
    ]  # fmt: skip
    assert [row["kind"] for row in read(tmp_path)].count("final") == 4


def test_what_is_absent_or_fails_is_a_row(tmp_path, asked, monkeypatch):
    def absent(model, params, **options):
        raise ModuleNotFoundError("No module named 'x'", name="x")

    def failing(model, params, **options):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(OPTIMIZERS, "SOAP", Entry(absent, SGD))
    monkeypatch.setitem(OPTIMIZERS, "Shampoo", Entry(failing, SGD))
    names = ["--optimizers", "SGD", "SOAP", "Shampoo"]
    assert command.main([*asked, *names]) == 0
    rows = [row for row in read(tmp_path) if row["status"] != "ok"]
    failed = [row for row in rows if row["optimizer"] == "Shampoo"]
    assert {row["status"] for row in failed} == {"failed: RuntimeError: no such thing"}
    assert len(failed) == 3 + 2 + 2
    text = (tmp_path / "rows.md").read_text()
    assert "| SOAP | absent: x | " in text
    assert "| Shampoo | 0 of 2 (2 failed) | ∞ | ∞ | " in text
    monkeypatch.setitem(OPTIMIZERS, "SOAP", OPTIMIZERS["SGD"])  # installed meanwhile
    assert command.main([*asked, *names]) == 0
    soap = [row for row in read(tmp_path) if row["optimizer"] == "SOAP"]
    soap = [row for row in soap if row["status"] == "ok"]
    assert {row["trial"] for row in soap if row["kind"] == "trial"} == {0, 1, 2}
    assert sum(row["kind"] != "trial" for row in soap) == 2 + 2


def test_sessions_are_late_when_a_run_would_be(tmp_path, file):
    plan = protocol.Plan(
        "small", "cpu", "fp32", 2, 1, tmp_path / "r.jsonl", file, tmp_path / "t.json", 0.0
    )
    session = Session("tiny", "SGD", plan)
    assert session.repeat("reference", {"lr": 0.1}, 0.75, 0, None) == [] and session.late
    assert session.best("trial", targets.final_metric) is None and session.budget == 12


def test_a_setting_that_meets_the_target_is_tried_on_more_seeds(tmp_path, file, monkeypatch):
    ends = {0: [1.0, 1.0, 1.0], 1: [1.0, 9.0], 2: [9.0]}  # of the seeds, by trial

    def attempted(task, name, options, seed, horizon, target):
        trial = round(options["lr"])
        steps = 10 * (3 - trial)  # the third would be the fastest, had it met the target
        return {"status": "ok", "steps": steps, "seconds": 1.0,
                "curve": [[0, 0.0, 9.0, 9.0], [steps, 1.0, 1.0, ends[trial][seed]]]}  # fmt: skip

    def suggested(space, told, number, horizon):
        return {"lr": number, "weight_decay": 0.1, "own": 0.1, "horizon": 0.5}

    monkeypatch.setattr(protocol, "attempt", attempted)
    monkeypatch.setattr(protocol, "suggest", suggested)
    monkeypatch.setitem(OPTIMIZERS, "SGD", replace(OPTIMIZERS["SGD"], untuned={"lr": 0}))
    plan = protocol.Plan("small", "cpu", "fp32", 3, 1, tmp_path / "r.jsonl", file,
                         tmp_path / "t.json", INFINITE)  # fmt: skip
    session = Session("tiny", "SGD", plan)

    def score(row):
        return targets.score(row, 2.0, 100)

    for _ in range(2):  # the second time there is nothing left to run
        session.tune("trial", score, None, 2.0, 3)
        assert {n: len(rows) for n, rows in session.trials("trial").items()} == {0: 3, 1: 2, 2: 1}
    assert session.best("trial", score)["trial"] == 0
