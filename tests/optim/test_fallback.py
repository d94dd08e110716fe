"""Parameters without Kronecker factors are trained as torch.optim.SGD or AdamW would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import REFUSED, Mixed, changed, copied, each_optimizer, loss_of, train
from torch import nn

from tn_kfac import KFAC
from tn_kfac.optim import rules

FACTORED = {"conv.weight", "conv.bias", "embedding.weight", "head.weight", "head.bias"}
OTHERS = {"norm.weight", "norm.bias", "table.weight", "scale"}

rates = st.floats(1e-4, 0.5)
decays = st.sampled_from([0.0, 0.03, 0.3])
momenta = st.sampled_from([0.0, 0.5, 0.9])


def test_model_has_parameters_of_both_kinds():
    assert {name for name, _ in Mixed().named_parameters()} == FACTORED | OTHERS


@each_optimizer
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_every_parameter_is_trained(digits, build, fallback):
    """Nothing is left behind: convolution, embedding, Linear, norm, table, stray parameter."""
    model = Mixed()
    before = copied(model)
    losses = train(model, build(model, fallback=fallback), digits, [0] * 30)
    assert changed(model, before) == FACTORED | OTHERS
    assert losses[-1] < 0.9 * losses[0]


def _assert_same_as_torch(digits, optimizer, model: nn.Module, oracle_class, **options) -> None:
    """Step clones of the fallback's parameters with torch's optimizer, on equal gradients."""
    parameters = {name: p for name, p in model.named_parameters() if name in OTHERS}
    clones = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    before = copied(model)
    oracle = oracle_class(list(clones.values()), **options)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, digits, step).backward()
        for name, clone in clones.items():
            clone.grad = parameters[name].grad.clone()
        optimizer.step()
        oracle.step()
    for name, clone in clones.items():
        assert torch.equal(clone, parameters[name]), name
    assert changed(model, before) >= set(clones)


@each_optimizer
@settings(max_examples=12)
@given(lr=rates, momentum=momenta, weight_decay=decays)
def test_sgd_fallback_is_torch_sgd(digits, build, lr, momentum, weight_decay):
    """Bit for bit, with the optimizer's own lr, momentum and weight decay."""
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    model = Mixed()
    optimizer = build(model, fallback="sgd", nesterov=False, **options)
    _assert_same_as_torch(digits, optimizer, model, torch.optim.SGD, **options)


@each_optimizer
@settings(max_examples=12)
@given(lr=rates, momentum=momenta, weight_decay=decays)
def test_adamw_fallback_is_torch_adamw(digits, build, lr, momentum, weight_decay):
    """Bit for bit, β₁ being the momentum."""
    model = Mixed()
    optimizer = build(model, fallback="adamw", lr=lr, momentum=momentum, weight_decay=weight_decay)
    options = {"lr": lr, "betas": (momentum, 0.999), "weight_decay": weight_decay}
    _assert_same_as_torch(digits, optimizer, model, torch.optim.AdamW, **options)


def test_fused_adamw_is_adamw(digits, monkeypatch):
    """As on a GPU, up to rounding."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        monkeypatch.setattr(rules, "_fuses", lambda *tensors, fused=fused: fused)
        optimizer = KFAC(model, fallback="adamw", warn_unsupported=False)
        train(model, optimizer, digits, range(3))
        found.append(copied(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@each_optimizer
@settings(max_examples=12)
@given(lr=rates, weight_decay=decays)
def test_fallback_has_options_of_its_own(digits, build, lr, weight_decay):
    """fallback_lr and fallback_weight_decay take the place of lr and weight_decay."""
    model = Mixed()
    own = {"fallback_lr": lr, "fallback_weight_decay": weight_decay}
    optimizer = build(model, fallback="adamw", lr=0.07, weight_decay=0.2, **own)
    options = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999)}
    _assert_same_as_torch(digits, optimizer, model, torch.optim.AdamW, **options)


@each_optimizer
def test_options_of_a_users_group_come_first(digits, build):
    """A group's own lr and weight decay win over the fallback's general ones."""
    model = Mixed()
    groups = [{"params": list(model.parameters()), "lr": 0.03, "weight_decay": 0.3}]
    general = {"fallback": "sgd", "fallback_lr": 9.0, "fallback_weight_decay": 9.0}
    optimizer = build(model, groups, nesterov=False, **general)
    options = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.3}
    _assert_same_as_torch(digits, optimizer, model, torch.optim.SGD, **options)


@each_optimizer
def test_without_fallback_parameters_are_named_and_left(digits, build):
    """fallback=None warns of every parameter that will stay as it is, and leaves it."""
    model = Mixed()
    with pytest.warns(UserWarning, match="4 parameters have no Kronecker factor") as caught:
        optimizer = build(model, fallback=None)
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in OTHERS)
    assert caught[0].filename == build.__call__.__code__.co_filename, (
        "the warning points at the caller"
    )
    before = copied(model)
    train(model, optimizer, digits, range(3))
    assert changed(model, before) == FACTORED


@each_optimizer
def test_without_fallback_no_warning_when_not_wanted(digits, build):
    """warn_unsupported=False is silent (warnings are errors here)."""
    model = Mixed()
    optimizer = build(model, fallback=None, warn_unsupported=False)
    before = copied(model)
    train(model, optimizer, digits, range(2))
    assert changed(model, before) == FACTORED


@each_optimizer
def test_parameters_that_were_asked_for_are_not_dropped_silently(build):
    """`build(model, model.parameters(), fallback=None)` cannot train all that it was given."""
    model = Mixed()
    with pytest.warns(UserWarning, match="4 parameters have no Kronecker factor"):
        build(model, model.parameters(), fallback=None)


@each_optimizer
def test_frozen_parameters_need_no_warning(build):
    """What takes no gradient is not missed."""
    model = Mixed()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in FACTORED)
    build(model, fallback=None)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == FACTORED


@each_optimizer
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_sparse_gradients_of_embeddings(digits, build, fallback):
    """A sparse embedding follows torch's SGD, or its AdamW as if the gradients were dense."""
    model = nn.Sequential(nn.Embedding(17, 4, sparse=True), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=REFUSED + "'0' has sparse gradients"):
        optimizer = build(model, lr=0.1, momentum=0.0, fallback=fallback)
    clone = model[0].weight.detach().clone().requires_grad_()
    oracle: torch.optim.Optimizer = torch.optim.SGD([clone], lr=0.1)
    if fallback == "adamw":
        oracle = torch.optim.AdamW([clone], lr=0.1, betas=(0.0, 0.999), weight_decay=0.0)
    tokens = (16 * digits[0][:4, 0, 3]).long()
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens).pow(2).mean().backward()
        clone.grad = model[0].weight.grad.clone()
        assert clone.grad.is_sparse
        clone.grad = clone.grad.to_dense() if fallback == "adamw" else clone.grad
        optimizer.step()
        oracle.step()
    assert torch.equal(clone, model[0].weight)
