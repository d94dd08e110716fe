"""torch.amp.GradScaler: scaled losses give unscaled steps, and infinities no step."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import (
    Mixed,
    copied,
    each_optimizer,
    factors_of,
    first_factor,
    is_fresh,
    loss_of,
    train,
)
from torch import nn
from torch.amp import GradScaler


def _scaler(scale: float = 2.0**10, enabled: bool = True) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=3, enabled=enabled)


def _scaled_steps(model, optimizer, digits, scaler, steps: range, factor: float = 1.0) -> None:
    """The loop of torch's documentation; the loss may be multiplied to overflow."""
    for step in steps:
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(model, digits, step)).backward()
        scaler.step(optimizer)
        scaler.update()


def _state(optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            yield f"{index} {key}", torch.as_tensor(value)


@each_optimizer
@settings(max_examples=10)
@given(
    exponent=st.integers(0, 20),
    interval=st.integers(1, 2),
    average=st.sampled_from([None, "batch"]),
    fallback=st.sampled_from(["sgd", "adamw"]),
)
def test_scaled_steps_equal_unscaled_ones(digits, build, exponent, interval, average, fallback):
    """Parameters, factors and momenta, to float32 rounding, while the scale grows."""
    options = {"T": interval, "loss_average": average, "fallback": fallback, "gentle": True}
    torch.manual_seed(0)
    model = Mixed()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model, **options), build(twin, **options)
    scaler = _scaler(2.0**exponent)
    _scaled_steps(model, optimizer, digits, scaler, range(5))
    train(twin, oracle, digits, range(5))
    assert scaler.get_scale() > 2.0**exponent, "the scale must have grown on the way"
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    pairs = dict(_state(oracle))
    for key, value in _state(optimizer):
        torch.testing.assert_close(
            value, pairs[key], rtol=1e-3, atol=1e-4, msg=lambda m, n=key: f"{n}: {m}"
        )
    assert not is_fresh(factors_of(optimizer.state[model.head.weight])[1])


@each_optimizer
def test_overflow_skips_the_step(digits, build):
    """Infinite gradients: parameters and state stay, the scale falls, training goes on."""
    model = Mixed()
    model.norm.eval()  # its running statistics would see the skipped batch
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model), build(twin)
    scaler = _scaler()
    _scaled_steps(model, optimizer, digits, scaler, range(2))
    before, state = copied(model), dict(_state(optimizer))
    scale = scaler.get_scale()

    _scaled_steps(model, optimizer, digits, scaler, range(2, 3), factor=1e38)
    assert scaler.get_scale() == scale / 2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    after = dict(_state(optimizer))
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)

    _scaled_steps(model, optimizer, digits, scaler, range(3, 5))
    train(twin, oracle, digits, range(2))
    train(twin, oracle, digits, range(3, 5))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@each_optimizer
def test_overflow_in_the_first_step(digits, build):
    """No state is made from infinities."""
    model = Mixed()
    optimizer = build(model)
    before = copied(model)
    _scaled_steps(model, optimizer, digits, _scaler(), range(1), factor=1e38)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(value.isfinite().all() for _, value in _state(optimizer))
    _scaled_steps(model, optimizer, digits, _scaler(), range(1, 3))
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@each_optimizer
def test_unscaled_and_clipped_gradients(digits, build):
    """scaler.unscale_ and a clip in between are those of a loop without a scaler."""
    model = Mixed()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model), build(twin)
    scaler = _scaler()
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, digits, step)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        oracle.zero_grad()
        loss_of(twin, digits, step).backward()
        assert norm > 0.5
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twin.parameters(), 0.5))
        oracle.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert not is_fresh(first_factor(optimizer.state[model.head.weight]))


def _of_no_scaler(optimizer):
    """A step of a scaler that is none of torch's, after it unscaled the gradients."""
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    optimizer.step()


@each_optimizer
def test_unknown_scaler_is_refused_with_a_remedy(digits, build):
    """It hides the scale that the curvature needs: a RuntimeError, after which steps go on."""
    model = Mixed()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model), build(twin)
    loss_of(model, digits, 0).backward()
    before = copied(model)
    with pytest.raises(RuntimeError, match=r"none of torch\.amp\.GradScaler"):
        _of_no_scaler(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.norm.load_state_dict(twin.norm.state_dict())
    assert train(model, optimizer, digits, range(3)) == train(twin, oracle, digits, range(3))


@each_optimizer
def test_disabled_scaler_is_no_scaler(digits, build):
    """GradScaler(enabled=False) takes the very same steps, unscale_ included."""
    model = Mixed()
    twin = copy.deepcopy(model)
    optimizer, oracle = build(model), build(twin)
    scaler = _scaler(enabled=False)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, digits, step)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    train(twin, oracle, digits, range(3))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert not is_fresh(first_factor(optimizer.state[model.head.weight]))
