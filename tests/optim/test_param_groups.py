"""Parameter groups: what they may hold, what they decide, and when they may be added."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import (
    OPTIMIZERS,
    Mixed,
    changed,
    copied,
    each_optimizer,
    first_factor,
    hooks_on,
    is_fresh,
    loss_of,
    train,
)
from torch import nn

OPTIONS_OF_A_LAYER = {
    "damping": (1e-3, 1e-2),
    "alpha1": (0.5, 0.1),
    "T": (1, 2),
    "lr_cov": (1e-2, 1e-1),
    "loss_average": ("batch", None),
    "structure": ("diagonal", "dense"),
    "kfac_approx": ("expand", "reduce"),
    "fisher": ("empirical", "forward-only"),
    "kfac_like": (False, True),
    "normalize_lr_cov": (False, True),
    "preconditioner_dtype": (None, torch.float64),
    "factor_decay": (0.9, 0.5),
    "T_inverse": (2, 3),
    "inverse": ("eigh", "newton-schulz"),
    "damping_mode": ("factored", "each"),
    "exponent": (1, 0.5),
    "stagger": (False, True),
    "lag": (0, 1),
}
each_option = pytest.mark.parametrize(
    ("build", "option"),
    [
        pytest.param(entry, option, id=f"{name}-{option}")
        for name, entry in OPTIMIZERS.items()
        for option in OPTIONS_OF_A_LAYER
        if option in entry.kind.option_checks
        and name not in ("SINGD dense", "EKFAC")
        and (option != "lag" or entry.defaults["T_inverse"] > 1)
    ],
)


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that decay, and biases and norms, which do not: as timm does."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    return decay, [p for p in model.parameters() if p.dim() <= 1]


@each_optimizer
@settings(max_examples=20)
@given(
    rates=st.tuples(*[st.floats(1e-3, 0.3)] * 2),
    decays=st.tuples(*[st.sampled_from([0.0, 0.01, 0.2])] * 2),
    momenta=st.tuples(*[st.sampled_from([0.0, 0.5, 0.9])] * 2),
)
def test_weight_and_bias_in_groups_of_their_own(digits, build, rates, decays, momenta):
    """Each follows p ← p − lr · b, b ← momentum · b + direction + decay · p with its own.

    The shared direction is read off a copy that takes one step with lr 1.
    """
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 10)).double()
    groups = [
        {"params": params, "lr": lr, "weight_decay": decay, "momentum": momentum}
        for params, lr, decay, momentum in zip(_split(model), rates, decays, momenta, strict=True)
    ]
    twin = copy.deepcopy(model)
    heavy = {"precondition": "gradient", "nesterov": False}
    optimizer = build(model, groups, **heavy)
    probe = build(twin, lr=1.0, momentum=0.0, **heavy)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    options = {p: group for group in groups for p in group["params"]}

    for step in range(3):
        before = copied(model)
        twin.load_state_dict(model.state_dict())
        for net, opt in ((model, optimizer), (twin, probe)):
            opt.zero_grad()
            loss_of(net, digits, step).backward()
            opt.step()
        names = zip(model.named_parameters(), twin.parameters(), strict=True)
        for at, ((name, p), q) in enumerate(names):
            group = options[p]
            direction = before[name] - q.detach() + group["weight_decay"] * before[name]
            velocity[at] = group["momentum"] * velocity[at] + direction
            expected = before[name] - group["lr"] * velocity[at]
            torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)
            assert not torch.equal(p, before[name])


@each_optimizer
def test_groups_are_split_by_rule(build):
    """Layers with factors and the rest become groups of their own, options and all."""
    model = Mixed()
    decay, plain = _split(model)
    named = {p: name for name, p in model.named_parameters()}
    optimizer = build(
        model,
        [{"params": decay, "weight_decay": 0.1, "note": 1}, {"params": plain, "lr": 0.2}],
        fallback="adamw",
        weight_decay=0.0,
        lr=0.3,
    )
    summary = [
        (group["rule"], group["lr"], group["weight_decay"], {named[p] for p in group["params"]})
        for group in optimizer.param_groups
    ]
    assert summary == [
        (build.kind.rule, 0.3, 0.1, {"conv.weight", "embedding.weight", "head.weight"}),
        ("adamw", 0.3, 0.1, {"table.weight"}),
        (build.kind.rule, 0.2, 0.0, {"conv.bias", "head.bias"}),
        ("adamw", 0.2, 0.0, {"norm.weight", "norm.bias", "scale"}),
    ]
    assert [group.get("note") for group in optimizer.param_groups] == [1, 1, None, None]


@each_option
def test_weight_and_bias_must_agree_on_their_factors(build, option):
    """Options of the pair of factors cannot differ between weight and bias."""
    model = nn.Sequential(nn.Linear(3, 2))
    groups = [
        {"params": [p], option: value}
        for p, value in zip(model.parameters(), OPTIONS_OF_A_LAYER[option], strict=True)
    ]
    with pytest.raises(ValueError, match=rf"layer '0'.*{option}"):
        build(model, groups)
    assert hooks_on(model) == 0


@each_option
def test_layers_may_differ_in_any_option(digits, build, option):
    """Two layers in two groups train with different values of every option."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 10))
    values = OPTIONS_OF_A_LAYER[option]
    groups = [
        {"params": layer.parameters(), option: value}
        for layer, value in zip((model[0], model[3]), values, strict=True)
    ]
    optimizer = build(model, groups)
    before = copied(model)
    train(model, optimizer, digits, range(3))
    assert changed(model, before) == set(before)


@each_optimizer
@pytest.mark.parametrize("shape", ["flat", "one group", "two groups"])
def test_named_parameters_are_the_same_as_parameters(digits, build, shape):
    """(name, parameter) pairs give the same trajectory, and groups know the names."""
    torch.manual_seed(3)
    model = Mixed()
    twin = copy.deepcopy(model)
    named, plain = list(model.named_parameters()), list(twin.parameters())
    if shape == "one group":
        named, plain = [{"params": named}], [{"params": plain}]
    elif shape == "two groups":
        named, plain = ([{"params": p[:4]}, {"params": p[4:], "lr": 0.1}] for p in (named, plain))
    optimizer, other = build(model, named), build(twin, plain)
    assert train(model, optimizer, digits, range(4)) == train(twin, other, digits, range(4))
    parameters = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert [parameters[name] for name in group["param_names"]] == group["params"]


@each_optimizer
def test_unfreezing_later(digits, build):
    """Layers that are added while training are captured and trained from then on."""
    model = Mixed()
    model.conv.requires_grad_(False)
    optimizer = build(model, model.head.parameters(), fallback="sgd")
    before = copied(model)
    train(model, optimizer, digits, range(3))
    assert changed(model, before) == {"head.weight", "head.bias"}

    model.conv.requires_grad_(True)
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    optimizer.add_param_group({"params": rest, "lr": 0.02})
    before = copied(model)
    train(model, optimizer, digits, range(3, 6))
    assert changed(model, before) == set(before)
    assert not is_fresh(first_factor(optimizer.state[model.conv.weight]))
    assert {group["rule"] for group in optimizer.param_groups} == {build.kind.rule, "sgd"}


@each_optimizer
def test_layer_unfrozen_in_place(digits, build):
    """A layer that was frozen when the optimizer was built trains once it is unfrozen."""
    model = Mixed()
    model.conv.requires_grad_(False)
    optimizer = build(model)
    before = copied(model)
    train(model, optimizer, digits, range(2))
    assert not changed(model, before) & {"conv.weight", "conv.bias"}
    model.conv.requires_grad_(True)
    train(model, optimizer, digits, range(2, 5))
    assert changed(model, before) == set(before)
    assert not is_fresh(first_factor(optimizer.state[model.conv.weight]))


def _bad_groups(model: Mixed) -> dict[str, tuple[dict, str]]:
    return {
        "foreign": ({"params": [nn.Parameter(torch.ones(3))]}, "not a parameter of model"),
        "twice in one group": ({"params": [model.scale, model.scale]}, "more than once"),
        "there already": ({"params": [model.head.weight]}, "has it already"),
        "bias after its weight": ({"params": [model.conv.bias]}, "layer 'conv'.*same time"),
        "bad option": ({"params": [model.scale], "lr": -1.0}, "lr must be"),
        "bad structure": ({"params": [model.scale], "structure": "wide"}, "structure='wide'"),
    }


@each_optimizer
@pytest.mark.parametrize("case", _bad_groups(Mixed()))
def test_refused_groups_change_nothing(digits, build, case):
    """ValueError says what is wrong; groups, hooks and training go on as before."""
    model = Mixed()
    optimizer = build(model, [model.head.weight, model.head.bias, model.conv.weight])
    groups, hooks = copy.deepcopy(optimizer.state_dict()["param_groups"]), hooks_on(model)
    group, message = _bad_groups(model)[case]
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert hooks_on(model) == hooks
    assert optimizer.state_dict()["param_groups"] == groups
    before = copied(model)
    train(model, optimizer, digits, range(2))
    assert changed(model, before) == {"head.weight", "head.bias", "conv.weight"}


@each_optimizer
def test_group_must_be_a_dict(build):
    """As torch: a bare list is refused."""
    model = Mixed()
    optimizer = build(model, model.head.parameters())
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group(list(model.conv.parameters()))
    assert len(optimizer.param_groups) == 1
