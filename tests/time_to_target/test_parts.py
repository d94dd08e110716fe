"""What counts as met, and the page; workloads, optimizers, schedules, spaces."""

import math
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import nn

from benchmarks.time_to_target import data, networks, spaces, targets
from benchmarks.time_to_target.muon import MuonAdamW, matrices
from benchmarks.time_to_target.optimizers import OPTIMIZERS, build, find, groups
from benchmarks.time_to_target.report import page
from benchmarks.time_to_target.spaces import DECADES, HORIZON, Space
from benchmarks.time_to_target.store import Store
from benchmarks.time_to_target.summary import Cell, cells, overall, profile, speedup
from benchmarks.time_to_target.training import Schedule, Training, attempt, marks, train
from benchmarks.time_to_target.tuning import suggest
from benchmarks.time_to_target.workloads import WORKLOADS, Task

INFINITE = float("inf")


def made_up(name, metrics, kind="final", status="ok", seconds=0.5, **more):
    curve = [[10 * i, seconds * i, 1.0, metric] for i, metric in enumerate(metrics)]
    row = {
        "workload": "tiny", "size": "small", "mode": "fp32", "optimizer": name, "kind": kind,
        "status": status, "curve": curve, "steps": 10 * (len(metrics) - 1), "horizon": 0.75,
        "seconds": seconds * (len(metrics) - 1), "options": {"lr": 0.1}, "device": "D",
        "torch": "2", "seed": 0,
    }  # fmt: skip
    return row | more


def test_score():
    met = made_up("SGD", [9.0, 5.0, 3.0, 2.0])
    assert targets.to_target(met, 3.0) == (20, 1.0)
    assert targets.score(met, 3.0, budget=40) == 0.5
    assert targets.score(met, 1.0, budget=40) == 1 + 1 / 8
    assert targets.to_target(met, 1.0) == (INFINITE, INFINITE)
    bad = made_up("SGD", [9.0, 2.0], status="diverged")  # even where it passed the target
    assert targets.score(bad, 3.0, budget=40) == targets.FAILED
    assert targets.final_metric(bad) == INFINITE and targets.best_metric(bad) == 2
    nothing = made_up("SGD", [], status="failed: X")
    assert targets.score(nothing, 3.0, 40) == 2 and targets.best_metric(nothing) == INFINITE
    assert targets.score(made_up("SGD", [9.0, 9.5]), 3.0, 40) == 2


def test_targets_are_what_the_better_baseline_always_reaches(tmp_path):
    runs = {
        "SGD": [made_up("SGD", [9.0, end]) for end in (1.0, 5.0, 3.0)],
        "AdamW": [made_up("AdamW", [9.0, end]) for end in (2.0, 2.5, 4.5)],
    }
    file = tmp_path / "targets.json"
    assert targets.fix("small", "a", runs, {"device": "D"}, file)["target"] == 4.5
    assert targets.load("small", "a", file)["from"] == "AdamW"
    assert targets.load("full", "a", file) is None
    failed = {"SGD": [made_up("SGD", [9.0], status="diverged")]}
    assert targets.fix("small", "b", failed, {}, file) is None


def test_failures_count_as_infinite():
    rows = [made_up("SGD", [9.0, 3.0]), made_up("SGD", [9.0, 8.0, 3.0]), made_up("SGD", [9.0])]
    cell = Cell(rows, 3.0)
    assert (cell.reached, cell.steps, cell.seconds) == (2, 20, 1.0)
    missed = Cell([*rows[:1], rows[2], rows[2]], 3.0)
    assert missed.seconds == INFINITE and speedup(missed, cell) == 0
    assert speedup(cell, cell) == 1 and speedup(cell, None) is None
    assert overall([2.0, 8.0]) == pytest.approx(4) and overall([2.0, 0.0]) is None
    found = profile({"a": {"X": 1.0, "Y": 2.0}, "b": {"X": 6.0, "Y": 3.0}, "c": {"X": INFINITE}})
    assert found == {"X": [1, 2, INFINITE], "Y": [1, 2, INFINITE]}
    assert cells([made_up("SGD", [], status="absent: x")], "final", 1.0) == {}


def test_page():
    known = {"target": 3.0, "from": "AdamW", "medians": {"AdamW": 2.9, "SGD": 4.0}}
    rows = [
        made_up("AdamW", [9.0, 5.0, 3.0]), made_up("AdamW", [9.0, 5.0], kind="untuned"),
        made_up("KFAC", [9.0, 3.0], seconds=0.8), made_up("KFAC", [9, 4, 2], kind="untuned"),
        made_up("Muon", [9.0, 8.0], status="diverged"),
        made_up("SOAP", [9.0], kind="trial", trial=0),
    ]  # fmt: skip
    text = page({"tiny": (known, rows)}, "small", ["p.png"])
    assert "| KFAC | 1.25 | 1.25 |" in text and "| Muon | 0.00 | - |" in text
    tuned = "lr 0.1, horizon 0.75"
    assert (
        f"| KFAC | 1 of 1 | 10 | 0.80 | 2.00 | 1.25 | 80.00 | 1 of 1 | 1.00 | 1.25 | {tuned} |"
    ) in text
    assert "| **AdamW** | 1 of 1 | 20 | 1.00 | 1.00 | 1.00 | 50.00 | 0 of 1 | ∞ | ∞ |" in text
    assert "| Muon | 0 of 1 (1 failed) | ∞ | ∞ | 0.00 | 0.00 |" in text
    assert "| SOAP | only tuned so far |" in text and "![p.png](p.png)" in text


def test_store_keeps_what_is_whole(tmp_path):
    store = Store(tmp_path / "new" / "rows.jsonl")
    assert store.rows() == []
    store.add({"a": 1, "value": 1 / 3, "curve": [[1, 2 / 3]]})
    with store.path.open("a") as file:
        file.write('{"a": 2, "val')
    store.add({"a": 3})
    assert store.rows() == [{"a": 1, "value": 0.33333, "curve": [[1, 0.66667]]}, {"a": 3}]
    assert store.rows(a=3) == [{"a": 3}] and store.rows(a=2) == []


def test_optuna_goes_on_where_it_was():
    pytest.importorskip("optuna")
    space = Space(1e-3, 1e-6, "damping", 1e-4)
    told = []
    for number in range(1, 12):
        found = suggest(space, told, number, None)
        assert found == suggest(space, told, number, None)
        assert all(low <= found[key] <= high for key, (low, high) in space.ranges().items())
        assert HORIZON[0] <= found["horizon"] <= HORIZON[1]
        told.append((found, abs(math.log10(found["lr"] / 0.3))))
    assert suggest(space, told, 12, 0.75)["horizon"] == 0.75
    late = median(math.log10(params["lr"] / 0.3) for params, _ in told[-4:])
    early = median(abs(math.log10(params["lr"] / 0.3)) for params, _ in told[:5])
    assert abs(late) < early


def test_spaces_are_alike():
    for entry in OPTIMIZERS.values():
        ranges = entry.space.ranges()
        for key, decades in DECADES.items():
            low, high = ranges[key]
            assert math.log10(high / low) == pytest.approx(decades)
        middle = {key: math.sqrt(low * high) for key, (low, high) in ranges.items()}
        assert len(entry.space.options(middle)) == 3
        assert not {"lr", "weight_decay"} & set(entry.fixed)


def test_schedule_and_marks():
    rates = [Schedule(100)(step) for step in range(100)]
    assert rates[4] == 1 and rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and rates[5] == 1
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 1e-3
    assert marks(100, 100, 4) == [0, 25, 50, 75, 100]
    assert marks(100, 60, 4) == [0, 25, 50, 60] and marks(100, 50, 4) == [0, 25, 50]


def test_runs_stop_at_the_target_and_when_they_diverge(file):
    task = Task("tiny", "small", "cpu", "fp32", file)
    whole = train(task, "SGD", {"lr": 0.1}, 0, 1.0, None)
    losses = [point[2:] for point in whole["curve"]]
    met = next(i for i, (loss, _) in enumerate(losses) if loss < losses[0][0])
    again = train(task, "SGD", {"lr": 0.1}, 0, 1.0, losses[met][1])
    assert [point[2:] for point in again["curve"]] == losses[: met + 1]
    assert whole["steps"] == 12 and again["steps"] == 3 * met
    assert train(task, "SGD", {"lr": 1e9}, 0, 1.0, None)["status"] == "diverged"
    assert attempt(task, "SGD", {"lr": -1.0}, 0, 1.0, None)["status"].startswith("failed: Value")


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "tiny"])
def test_workloads(name, file):
    known = WORKLOADS[name]
    assert known.sizes["short"].network == known.sizes["full"].network
    few = replace(known.sizes["small"], batch=8, held_out=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKLOADS, name, replace(known, sizes={"small": few}))
        patch.setattr(data, "CURVES", (40, 20))
        task = Task(name, "small", "cpu", "fp32", file)
    one, other = task.model(3), task.model(3)
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())
    for (x, y), (again, _) in zip(task.batches(1), task.batches(1), strict=False):
        assert torch.equal(x, again)
        assert task.loss(task.outputs(one, x), y).isfinite()
        break
    loss, metric = task.evaluate(one)
    assert math.isfinite(loss) and math.isfinite(metric) and one.training


@pytest.mark.filterwarnings("ignore:.*:SyntaxWarning")
@pytest.mark.parametrize("name", [*OPTIMIZERS, "SINGD diagonal:fisher='mc',T=1,norms=True"])
def test_every_optimizer_trains_every_parameter(name, file):
    if name in ("SOAP", "Shampoo"):
        pytest.importorskip("pytorch_optimizer")
    entry = find(name)
    task = Task("tiny", "small", "cpu", "fp32", file)
    run = Training(task, name, entry.untuned | {"weight_decay": 0.1}, 0, 20)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.advance(4)
    for old, new in zip(before, run.model.parameters(), strict=True):
        assert new.isfinite().all() and not torch.equal(old, new)
    for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
        assert group["lr"] == rate * run.schedule(3)


def test_only_weights_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, rest = groups(model, 0.5)
    assert decayed == {"params": [model[0].weight], "weight_decay": 0.5}
    assert len(rest["params"]) == 3 and rest["weight_decay"] == 0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("SINGD diagonal", "KFAC", "Muon"):
        optimizer = build(find(name), nn.Sequential(model, nn.Linear(4, 2)),
                          {"lr": 0.1, "weight_decay": 0.5}, "batch")  # fmt: skip
        decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        vectors = [p for p in decays if p.ndim == 1]
        assert {decays[p] for p in vectors} == {0.0} and len(vectors) == 4
        assert {decays[p] for p in decays if p.ndim > 1} == {0.5}
        getattr(optimizer, "close", lambda: None)()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_muon_takes_matrices_and_views_of_them():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(),
                          nn.Linear(64, 6), nn.Linear(6, 3))  # fmt: skip
    assert set(matrices(model)) == {model[0].weight, model[3].weight}
    attention = nn.Sequential(networks.Attention(8, 2, causal=True), nn.Linear(8, 2))
    assert sorted(matrices(attention).values()) == [1, 3]
    twin = nn.Linear(18, 4, bias=False)
    twin.weight.data = model[0].weight.data.flatten(1).clone()
    ours = MuonAdamW(model, groups(model, 0.1), lr=0.1)
    theirs = torch.optim.Muon(twin.parameters(), 0.1, 0.1, adjust_lr_fn="match_rms_adamw")
    model(torch.randn(3, 2, 8, 8)).square().sum().backward()
    twin.weight.grad = model[0].weight.grad.flatten(1).clone()
    ours.step()
    theirs.step()
    torch.testing.assert_close(model[0].weight.flatten(1), twin.weight)
    ours.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_names_of_variants():
    grafted = {"update_rms": None, "graft": "adamw", "nesterov": False}
    said = ",".join(f"{key}={value!r}" for key, value in grafted.items())
    entry = find(f"SINGD diagonal:T=1,structure='dense',{said}")
    assert entry.fixed == {"structure": "dense", "T": 1} | grafted
    assert entry.space is spaces.GRAFTED
    build(entry, nn.Linear(3, 4), {"lr": 0.1}, "batch").close()
    assert find("SINGD diagonal:update_rms=None").space is spaces.CURVATURE
    assert find("SINGD diagonal:update_rms=0.1").space is spaces.LENGTHENED
    assert find("KFAC:update_rms=0.1").space is spaces.GRAFTED
    for name in ("SINGD diagonal", "KFAC:graft='adamw'"):
        assert find(name).space.lr == OPTIMIZERS["AdamW"].space.lr
    for wrong in ("SDG", "SINGD diagonal:T", "SINGD diagonal:T=f(1)"):
        with pytest.raises(ValueError, match=r"no optimizer|key=value"):
            find(wrong)
