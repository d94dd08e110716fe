"""A state of another model, structure or optimizer is refused, and nothing is changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import copied, each_optimizer, train
from torch import nn

from tn_kfac import SINGD


def _network(hidden: int = 5, layers: int = 2, bias: bool = True) -> nn.Module:
    parts: list[nn.Module] = [nn.Flatten(), nn.Linear(64, hidden, bias=bias), nn.Tanh()]
    for _ in range(layers - 2):
        parts += [nn.Linear(hidden, hidden), nn.Tanh()]
    return nn.Sequential(*parts, nn.LayerNorm(hidden), nn.Linear(hidden, 10))


OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a wider model": (lambda: _network(hidden=7), {}),
    "a deeper model": (lambda: _network(layers=3), {}),
    "a model without a bias": (lambda: _network(bias=False), {}),
    "another input structure": (_network, {"structure": ("dense", "diagonal")}),
    "another output structure": (_network, {"structure": ("diagonal", "dense")}),
    "another fallback": (_network, {"fallback": "sgd"}),
    "no fallback": (_network, {"fallback": None, "warn_unsupported": False}),
    "another approximation": (_network, {"kfac_approx": "reduce"}),
    "another average": (_network, {"loss_average": None}),
}
OWN = {"lr": 0.05, "T": 1, "structure": "diagonal", "kfac_approx": "expand"}


# A state without a step holds no shapes, so it fits any model with as many parameters.
ONLY_TRAINED = {"a wider model"}
CASES = [(name, steps) for name in OTHERS for steps in (0, 2) if steps or name not in ONLY_TRAINED]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_state_of_another_is_refused(digits, name, steps):
    """ValueError; groups, factors and the steps that follow are as if nothing had happened.

    Options that are built into the capture (structure, approximation, average) are refused
    as well: taking only the words over would leave the group saying what is not done.
    """
    other_model, options = OTHERS[name]
    other = other_model()
    foreign = SINGD(other, **(OWN | options))
    train(other, foreign, digits, range(steps))

    model, twin = _network(), _network()
    twin.load_state_dict(model.state_dict())
    optimizer, undisturbed = SINGD(model, **OWN), SINGD(twin, **OWN)
    train(model, optimizer, digits, range(2))
    train(twin, undisturbed, digits, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    expected = train(twin, undisturbed, digits, range(2, 4))
    assert train(model, optimizer, digits, range(2, 4)) == expected
    assert all(map(torch.equal, copied(model).values(), copied(twin).values()))


@each_optimizer
def test_error_names_the_parameter(digits, build):
    """The message leads to the tensor that does not fit."""
    wide, model = _network(hidden=7), _network()
    foreign = build(wide)
    train(wide, foreign, digits, range(1))
    key = build.kind.factor_names[1]
    message = rf"holds {key} of shape .* for parameter 0 of group 0, shape \(5, 64\)"
    with pytest.raises(ValueError, match=message):
        build(model).load_state_dict(foreign.state_dict())


@each_optimizer
@pytest.mark.parametrize("oracle", [torch.optim.SGD, torch.optim.AdamW])
def test_state_of_a_torch_optimizer_is_refused(digits, build, oracle):
    """Its groups hold other parameters and follow no rule of ours."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    foreign = oracle(model.parameters(), lr=0.1)
    train(model, foreign, digits, range(2))
    optimizer = build(model)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="state_dict has the groups"):
        optimizer.load_state_dict(foreign.state_dict())
    assert optimizer.state_dict() == before


@each_optimizer
@pytest.mark.parametrize("at", [0, 1, 2])
def test_state_with_a_missing_factor_is_refused(digits, build, at):
    """A truncated state is no state: it would fail in the next step, far from its cause."""
    key = (*build.kind.factor_names, "step")[at]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = build(model)
    train(model, optimizer, digits, range(2))
    state = optimizer.state_dict()
    del state["state"][0][key]
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        optimizer.load_state_dict(state)
