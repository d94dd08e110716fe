"""Optimizers with other Fishers than the empirical one."""

import pytest
import torch
from optimizers import OPTIMIZERS, each_optimizer, factors_of, first_factor
from torch import nn

LOSS = nn.CrossEntropyLoss()


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 10)
    return nn.Sequential(*layers).double()


def batch(digits, step, size=8):
    part = slice(step * size, (step + 1) * size)
    return digits[0][part].double(), digits[1][part]


def step(model, optimizer, parts, **options):
    """One step on micro-batches (x, y); the loss is the mean over all of them."""
    optimizer.zero_grad()
    total = sum(len(x) for x, _ in parts)
    for x, y in parts:
        outputs = model(x)
        optimizer.curvature(outputs, LOSS, y, **options)
        (LOSS(outputs, y) * len(x) / total).backward()
    optimizer.step()


def each_fisher(*fishers: str):
    """Every optimizer with every Fisher, but exact second moments of no gradients."""
    return pytest.mark.parametrize(
        ("build", "fisher"),
        [
            pytest.param(build, fisher, id=f"{name}-{fisher}")
            for name, build in OPTIMIZERS.items()
            for fisher in fishers
            if fisher != "forward-only" or not build.defaults.get("ekfac")
        ],
    )


@each_fisher("mc", "type-2", "forward-only", "empirical")
def test_every_fisher_trains(build, fisher, digits):
    model = net()
    optimizer = build(model, fisher=fisher, damping=0.1)
    for group in optimizer.param_groups:
        group["lr"] *= build.pace
    x, y = batch(digits, 0, 64)
    before = LOSS(model(x), y).item()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step(model, optimizer, [(x, y)], generator=generator)
    assert LOSS(model(x), y).item() < 0.7 * before


@each_fisher("type-2", "forward-only", "empirical")
def test_micro_batches_equal_one_batch(build, fisher, digits):
    models = net(), net()
    optimizers = [build(model, fisher=fisher) for model in models]
    for at in range(3):
        x, y = batch(digits, at)
        step(models[0], optimizers[0], [(x, y)])
        step(models[1], optimizers[1], [(x[:3], y[:3]), (x[3:], y[3:])])
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@each_optimizer
def test_a_forgotten_call_is_an_error(build, digits):
    model = net()
    optimizer = build(model, fisher="mc")
    x, y = batch(digits, 0)
    LOSS(model(x), y).backward()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"optimizer\.curvature"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@each_optimizer
def test_an_interval_that_is_shortened_waits_for_the_next_pass(build, digits):
    """The forward pass before was not measured, so the factors stay until the next."""
    model = net()
    optimizer = build(model, fisher="mc", T=10)
    for at in range(4):
        x, y = batch(digits, at)
        step(model, optimizer, [(x, y)])
        if at == 1:
            for group in optimizer.param_groups:
                group["T"] = 1
        assert optimizer.state[next(iter(model.parameters()))]["updates"] == (1, 1, 1, 2)[at]


@each_optimizer
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_outputs_that_are_not_finite_move_no_factor(build, fisher, digits):
    """No sampling from no distribution: the step is the user's to skip."""
    model = net()
    optimizer = build(model, fisher=fisher)
    step(model, optimizer, [batch(digits, 0)])
    state = optimizer.state[next(iter(model.parameters()))]
    before = [factor.clone() for factor in factors_of(state)]
    x, y = batch(digits, 1)
    optimizer.zero_grad()
    outputs = model(x * float("nan"))
    optimizer.curvature(outputs, "cross_entropy", y)
    LOSS(outputs, y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.grad.zero_()
    optimizer.step()
    assert all(map(torch.equal, before, factors_of(state)))


@each_optimizer
def test_steps_without_update_need_no_call_and_it_does_nothing(build, digits):
    model = net()
    optimizer = build(model, fisher="mc", T=2)
    x, y = batch(digits, 0)
    step(model, optimizer, [(x, y)])
    optimizer.zero_grad()
    LOSS(model(x), y).backward()
    optimizer.step()
    step(model, optimizer, [(x, y)])
    outputs = model(x)
    optimizer.curvature(outputs, LOSS, y)
    assert all(b.tap.factors() is None for b in optimizer._bindings)


@each_optimizer
@pytest.mark.parametrize("samples", [0, -1, 1.5])
def test_impossible_numbers_of_samples(build, samples, digits):
    model = net()
    optimizer = build(model, fisher="mc")
    x, y = batch(digits, 0)
    with pytest.raises((ValueError, TypeError), match="samples"):
        optimizer.curvature(model(x), LOSS, y, samples=samples)


@each_optimizer
def test_unknown_fishers_are_refused_before_anything_is_hooked(build):
    model = net()
    with pytest.raises(ValueError, match=r"fisher.*'exact'"):
        build(model, fisher="exact")
    assert not any(module._forward_hooks for module in model.modules())


@each_optimizer
def test_norm_layers_get_factors_where_asked_for(build):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()
    optimizer = build(model, norms=True, damping=0.1, lr=0.01)
    assert len(optimizer.param_groups) == 1
    x = torch.randn(6, 4, dtype=torch.float64)
    before = model(x).square().mean().item()
    for _ in range(30):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert model(x).square().mean().item() < before
    assert first_factor(optimizer.state[model[1].weight]).shape[0] == 3


@each_optimizer
def test_autocast_in_bfloat16(build, digits):
    model = net().float()
    optimizer = build(model, fisher="mc")
    x, y = batch(digits, 0, 64)
    x = x.float()
    before = LOSS(model(x), y).item()
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(x)
            loss = LOSS(outputs, y)
            optimizer.curvature(outputs, LOSS, y)
        loss.backward()
        optimizer.step()
    assert LOSS(model(x), y).item() < before


@each_optimizer
@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)], ids=str)
def test_autocast_keeps_norm_layers_as_they_were(build, norm):
    """It runs them in float32, with or without factors."""
    model, x = nn.Sequential(norm).eval(), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        optimizer = build(model, norms=True)
        assert torch.equal(model(x), before)
    optimizer.close()
