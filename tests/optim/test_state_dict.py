"""Checkpoints: plain, unaliased, and enough to go on bit by bit."""

import copy
from io import BytesIO
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import (
    OPTIMIZERS,
    Mixed,
    copied,
    each_optimizer,
    factors_of,
    first_factor,
    is_fresh,
    train,
)
from torch import Tensor, nn

PLAIN = (bool, int, float, str, type(None), torch.dtype)


def _leaves(value: Any) -> list[Any]:
    """Everything in nested containers that is not a container."""
    if isinstance(value, dict):
        return [leaf for key, entry in value.items() for leaf in (key, *_leaves(entry))]
    if isinstance(value, (list, tuple)):
        return [leaf for entry in value for leaf in _leaves(entry)]
    return [value]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _same(first: Any, second: Any) -> bool:
    """Equality of nested containers, bit by bit."""
    ones, others = _leaves(first), _leaves(second)
    return len(ones) == len(others) and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
        for a, b in zip(ones, others, strict=True)
    )


def _through_a_file(state: Any) -> Any:
    buffer = BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@each_optimizer
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_state_is_plain_tensors_and_numbers(digits, build, fallback):
    """torch.load opens it with its defaults, weights_only=True; nothing is lost."""
    model = Mixed()
    optimizer = build(model, model.named_parameters(), fallback=fallback)
    train(model, optimizer, digits, range(2))
    state = optimizer.state_dict()
    assert all(type(leaf) is Tensor or isinstance(leaf, PLAIN) for leaf in _leaves(state))
    assert len(_tensors(state)) > 10
    assert _same(_through_a_file(state), state)


@each_optimizer
def test_state_does_not_alias_the_optimizer(digits, build):
    """A state that is kept does not change while training goes on, nor the reverse."""
    model = Mixed()
    optimizer = build(model)
    train(model, optimizer, digits, range(2))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    train(model, optimizer, digits, range(2, 4))
    assert _same(state, kept)
    now = optimizer.state_dict()
    assert not _same(now, kept)
    for tensor in _tensors(state):
        tensor.zero_()
    assert _same(optimizer.state_dict(), now)


@each_optimizer
def test_loading_leaves_the_callers_dict_alone(digits, build):
    """Neither load_state_dict nor training after it changes or keeps what was passed."""
    model = Mixed()
    optimizer = build(model)
    train(model, optimizer, digits, range(2))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    twin = copy.deepcopy(model)
    other = build(twin)
    other.load_state_dict(state)
    assert _same(state, kept)
    train(twin, other, digits, range(2, 4))
    assert _same(state, kept)
    loaded = other.state_dict()
    for tensor in _tensors(state):
        tensor.zero_()
    assert _same(other.state_dict(), loaded)


RESUMED = {
    "build": st.sampled_from(list(OPTIMIZERS.values())),
    "stop": st.integers(0, 6),
    "interval": st.integers(1, 4),
    "fallback": st.sampled_from(["sgd", "adamw"]),
    "momentum": st.sampled_from([0.0, 0.9]),
    "used": st.booleans(),
}


@settings(max_examples=30)
@given(**RESUMED)
def test_resumed_run_is_bit_identical(digits, build, stop, interval, used, **options):
    """Stop anywhere, load into a new (or used) optimizer of a new model, and go on."""
    options |= {"T": interval}
    torch.manual_seed(0)
    model, resumed = Mixed(), Mixed()
    optimizer = build(model, **options)
    train(model, optimizer, digits, range(stop))
    weights, state = _through_a_file([model.state_dict(), optimizer.state_dict()])
    expected = train(model, optimizer, digits, range(stop, 8))

    other = build(resumed, **options)
    if used:
        train(resumed, other, digits, range(3))
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    assert train(resumed, other, digits, range(stop, 8)) == expected
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))
    assert _same(other.state_dict(), optimizer.state_dict())


@each_optimizer
@pytest.mark.parametrize(
    ("weights", "factors"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                             (torch.float32, torch.float64)]
)  # fmt: skip
def test_factors_keep_their_dtype(digits, build, weights, factors):
    """torch would cast loaded state to the parameter's dtype."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(weights)
    dtype = None if factors == torch.float32 else factors
    optimizer = build(model, preconditioner_dtype=dtype)
    train(model, optimizer, digits, range(3))
    state = optimizer.state_dict()
    other = build(copy.deepcopy(model), preconditioner_dtype=dtype)
    other.load_state_dict(_through_a_file(state))
    assert _same(other.state_dict(), state)
    loaded = other.state_dict()["state"][0]
    assert [factor.dtype for factor in factors_of(loaded)] == [factors] * 2
    assert loaded["momentum_buffer"].dtype == weights
    assert not is_fresh(first_factor(loaded))


@each_optimizer
def test_schedules_are_not_stored_but_kept(digits, build):
    """A callable is None in the state; loading keeps the optimizer's own."""
    model, key = Mixed(), build.scheduled
    optimizer = build(model, **{key: lambda step: 0.1 / (1 + step)})
    train(model, optimizer, digits, range(2))
    state = optimizer.state_dict()
    assert [group[key] for group in state["param_groups"] if key in group] == [None]

    def own(step: int) -> float:
        return 0.01 * step

    other = build(copy.deepcopy(model), **{key: own})
    other.load_state_dict(state)
    assert other.param_groups[0][key] is own


@each_optimizer
def test_hyper_parameters_of_the_state_are_used(digits, build):
    """As with torch optimizers lr and the like come back with the state."""
    model = Mixed()
    optimizer = build(model, lr=0.02, damping=0.01, momentum=0.7)
    train(model, optimizer, digits, range(2))
    twin = copy.deepcopy(model)
    other = build(twin, lr=0.5, damping=0.5, momentum=0.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.02
    expected = train(model, optimizer, digits, range(2, 5))
    assert train(twin, other, digits, range(2, 5)) == expected
    assert copied(twin).keys() == copied(model).keys()
