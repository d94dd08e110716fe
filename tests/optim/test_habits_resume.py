"""Training habits: checkpoints by parameter names, and runs that go on in a new process."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import OPTIMIZERS, Mixed, each_optimizer, first_factor, is_fresh, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

HERE = Path(__file__).parent


def _assert_same_run(model, optimizer, twin, oracle) -> None:
    """Parameters, buffers and state, bit by bit."""
    ours, theirs = model.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        state, expected = optimizer.state[p], oracle.state[q]
        assert state.keys() == expected.keys()
        for key in state:
            assert torch.equal(*map(torch.as_tensor, (state[key], expected[key]))), key


def _stepped(digits, build, stop: int, **options):
    model = Mixed()
    optimizer = build(model, **options)
    train(model, optimizer, digits, range(stop))
    return model, optimizer


@each_optimizer
@settings(max_examples=8)
@given(
    stop=st.integers(1, 5),
    interval=st.integers(1, 3),
    fallback=st.sampled_from(["sgd", "adamw"]),
    momentum=st.sampled_from([0.0, 0.9]),
    flatten=st.booleans(),
)
def test_state_by_parameter_names(digits, build, stop, interval, fallback, momentum, flatten):
    """torch.distributed.checkpoint's state into an optimizer that has trained before."""
    options = {"T": interval, "fallback": fallback, "momentum": momentum}
    how = StateDictOptions(flatten_optimizer_state_dict=flatten)
    torch.manual_seed(0)
    model, optimizer = _stepped(digits, build, stop, **options)
    weights = copy.deepcopy(get_model_state_dict(model))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how))
    entries = state if flatten else state["state"]
    assert any("conv.weight" in name for name in entries)
    expected = train(model, optimizer, digits, range(stop, 8))

    other, resumed = _stepped(digits, build, 2, **options)
    set_model_state_dict(other, weights)
    set_optimizer_state_dict(other, resumed, state, options=how)
    assert train(other, resumed, digits, range(stop, 8)) == expected
    _assert_same_run(other, resumed, model, optimizer)


@each_optimizer
def test_names_and_not_positions_decide(digits, build):
    """The saved groups may list their parameters in another order than the new optimizer's."""
    model = Mixed()
    twin = copy.deepcopy(model)
    optimizer = build(model, list(model.parameters()))
    reversed_layers = [
        twin.head.weight, twin.head.bias, twin.scale, twin.table.weight, twin.embedding.weight,
        twin.norm.bias, twin.norm.weight, twin.conv.weight, twin.conv.bias,
    ]  # fmt: skip
    other = build(twin, reversed_layers)
    train(model, optimizer, digits, range(3))
    train(twin, other, digits, range(1))
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    set_state_dict(twin, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    _assert_same_run(twin, other, model, optimizer)
    expected = train(model, optimizer, digits, range(3, 6))
    assert train(twin, other, digits, range(3, 6)) == expected
    _assert_same_run(twin, other, model, optimizer)


@each_optimizer
def test_state_of_two_optimizers_by_names(digits, build):
    """One call saves and one call loads the optimizers of two parts of a model."""
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Tanh(), nn.Linear(72, 10))
        runs.append((net, [build(net, net[0].parameters()), build(net, net[3].parameters())]))

    def go(net: nn.Module, optimizers: list, steps: range) -> None:
        for step in steps:
            batch = slice(8 * step, 8 * step + 8)
            net.zero_grad()
            outputs = net(digits[0][batch].float())
            nn.functional.cross_entropy(outputs, digits[1][batch]).backward()
            for optimizer in optimizers:
                optimizer.step()

    go(*runs[0], range(3))
    go(*runs[1], range(1))
    state = copy.deepcopy(get_state_dict(*runs[0]))
    set_state_dict(*runs[1], model_state_dict=state[0], optim_state_dict=state[1])
    for run in runs:
        go(*run, range(3, 6))
    assert all(map(torch.equal, runs[0][0].parameters(), runs[1][0].parameters()))
    assert not is_fresh(first_factor(runs[1][1][1].state[runs[1][0][3].weight]))


CONTINUE = """
import json, sys, warnings
import torch

folder, options = sys.argv[1], json.loads(sys.argv[2])
warnings.simplefilter("error")
torch.set_num_threads(1)
from optimizers import OPTIMIZERS, Mixed, train

saved = torch.load(folder + "/checkpoint.pt", weights_only=True)
build, rest = OPTIMIZERS[options.pop("name")], options.pop("rest")
torch.manual_seed(1)
model = Mixed()
optimizer = build(model, **options)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
schedule.load_state_dict(saved["schedule"])
losses = []
for step in rest:
    losses += train(model, optimizer, saved["digits"], [step])
    schedule.step()
result = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
torch.save(result, folder + "/result.pt")
"""


def _leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *_leaves(value[key]))]
    return [e for v in value for e in _leaves(v)] if isinstance(value, (list, tuple)) else [value]


ELSEWHERE = {
    "adamw, reduce": {"stop": 3, "T": 2, "fallback": "adamw", "kfac_approx": "reduce"},
    "sgd, expand": {"stop": 4, "T": 3, "fallback": "sgd", "lr": 0.013, "gentle": True},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", ELSEWHERE)
def test_resume_in_a_new_process(digits, tmp_path, name, case):
    """torch.save after some steps; torch.load(weights_only=True) elsewhere goes on bit by bit."""
    options = dict(ELSEWHERE[case])
    stop = options.pop("stop")
    torch.manual_seed(0)
    data = (digits[0][:64].clone(), digits[1][:64].clone())
    model = Mixed()
    optimizer = OPTIMIZERS[name](model, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def go(steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses += train(model, optimizer, data, [step])
            schedule.step()
        return losses

    go(range(stop))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    states = {key: part.state_dict() for key, part in parts.items()}
    torch.save(states | {"digits": data}, tmp_path / "checkpoint.pt")
    said = json.dumps(options | {"name": name, "rest": list(range(stop, 8))})
    root = Path(__import__("tn_kfac").__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", CONTINUE, str(tmp_path), said],
        check=True,
        env={"PYTHONPATH": f"{root}:{HERE}", "OMP_NUM_THREADS": "1", "PATH": ""},
        timeout=120,
    )
    losses = go(range(stop, 8))
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert result["losses"] == losses
    expected = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    pairs = zip(*(_leaves([tree["model"], tree["optimizer"]]) for tree in (result, expected)),
                strict=True)  # fmt: skip
    for ours, theirs in pairs:
        if isinstance(theirs, Tensor):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        else:
            assert ours == theirs


@each_optimizer
@pytest.mark.parametrize("mapped", ["cpu", torch.device("cpu"), lambda storage, where: storage])
def test_state_loads_in_the_ways_of_torch_load(digits, build, tmp_path, mapped):
    """map_location of every kind, and mmap, from a file; the run goes on bit by bit."""
    model, optimizer = _stepped(digits, build, 3, T=2)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(states, tmp_path / "state.pt")
    mmap = mapped == "cpu"
    saved = torch.load(tmp_path / "state.pt", map_location=mapped, weights_only=True, mmap=mmap)
    twin = Mixed()
    other = build(twin, T=2)
    twin.load_state_dict(saved["model"], assign=False)
    other.load_state_dict(saved["optimizer"])
    expected = train(model, optimizer, digits, range(3, 6))
    assert train(twin, other, digits, range(3, 6)) == expected
    _assert_same_run(twin, other, model, optimizer)
