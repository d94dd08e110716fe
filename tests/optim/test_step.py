"""What one step takes in and leaves behind."""

import copy

import pytest
import torch
from optimizers import (
    Mixed,
    changed,
    copied,
    each_optimizer,
    first_factor,
    is_fresh,
    loss_of,
    train,
)
from torch import Tensor, nn


def _states(optimizer) -> list[Tensor]:
    """All tensors of the state, copied."""
    tensors = (v for state in optimizer.state.values() for v in state.values())
    return [value.clone() for value in tensors if isinstance(value, Tensor)]


def _assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) > 0
    assert all(map(torch.equal, first, second))


def _twins() -> tuple[Mixed, Mixed]:
    model = Mixed()
    return model, copy.deepcopy(model)


@each_optimizer
def test_closure_steps_like_a_loop(digits, build):
    """step(closure) evaluates it with gradients on, steps, and returns its loss."""
    model, twin = _twins()
    optimizer, other = build(model), build(twin)
    expected = train(twin, other, digits, range(4))

    def closure(step: int) -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, digits, step)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(lambda step=step: closure(step)).item() for step in range(4)]
    assert losses == expected
    _assert_equal(list(model.parameters()), list(twin.parameters()))


@each_optimizer
def test_step_without_closure_returns_nothing(digits, build):
    model = Mixed()
    optimizer = build(model)
    loss_of(model, digits, 0).backward()
    assert optimizer.step() is None


@each_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_statistics_too(digits, build, set_to_none):
    """A backward pass that is thrown away leaves no trace in the next step."""
    model, twin = _twins()
    twin_optimizer, optimizer = build(twin), build(model)
    for part in (model, twin):
        part.norm.eval()  # its running statistics do see the first pass
    loss_of(model, digits, 5).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    gradients = [p.grad for p in model.parameters()]
    assert all(g is None if set_to_none else not g.any() for g in gradients)
    train(twin, twin_optimizer, digits, range(1))
    loss_of(model, digits, 0).backward()
    optimizer.step()
    _assert_equal(list(model.parameters()), list(twin.parameters()))
    _assert_equal(_states(optimizer), _states(twin_optimizer))


@each_optimizer
def test_step_consumes_statistics(digits, build):
    """Without zero_grad gradients pile up, as torch's do, but curvature does not."""
    model = Mixed()
    optimizer = build(model)
    loss_of(model, digits, 0).backward()
    optimizer.step()
    before = _states(optimizer)
    factors = {
        p: first_factor(optimizer.state[p]).clone() for p in (model.conv.weight, model.head.weight)
    }
    with pytest.warns(UserWarning, match="no layer captured curvature"):
        optimizer.step()
    assert all(torch.equal(first_factor(optimizer.state[p]), K) for p, K in factors.items())
    assert not all(map(torch.equal, before, _states(optimizer))), "momentum goes on"


@each_optimizer
def test_gradient_without_statistics_is_a_plain_sgd_step(build):
    """Gradients set by hand: K and C are still I, so the direction is the gradient."""
    model = nn.Linear(3, 2)
    before = copied(model)
    optimizer = build(model, lr=0.1, momentum=0.0, update_rms=None)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="no layer captured curvature"):
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1)
    assert is_fresh(first_factor(optimizer.state[model.weight]))


@each_optimizer
def test_statistics_without_gradient_change_nothing(digits, build):
    """`model.zero_grad()` before the step: no parameter, no factor moves, nothing is kept."""
    model, twin = _twins()
    optimizer, other = build(model), build(twin)
    for part in (model, twin):
        part.norm.eval()
    loss_of(model, digits, 3).backward()
    model.zero_grad()
    before = copied(model)
    optimizer.step()
    assert not changed(model, before)
    train(model, optimizer, digits, range(2))
    train(twin, other, digits, range(2))
    _assert_equal(list(model.parameters()), list(twin.parameters()))


class Branches(nn.Module):
    """Uses one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(64, 10)
        self.right = nn.Linear(64, 10)
        self.use_left = True

    def forward(self, x: Tensor) -> Tensor:
        return (self.left if self.use_left else self.right)(x.flatten(1))


@each_optimizer
def test_unused_layer_is_left_alone(digits, build):
    """A layer without gradient keeps its weight, and joins when it is used."""
    model = Branches()
    optimizer = build(model, weight_decay=0.1)
    before = copied(model)
    train(model, optimizer, digits, range(3))
    assert changed(model, before) == {"left.weight", "left.bias"}
    model.use_left = False
    before = copied(model)
    train(model, optimizer, digits, range(3, 6))
    assert changed(model, before) == {"right.weight", "right.bias"}
    assert not is_fresh(first_factor(optimizer.state[model.right.weight]))


class Tied(nn.Module):
    """Two modules with one weight and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.stem(x.flatten(1)))
        return self.head(self.second(torch.tanh(self.first(hidden))))


class Reused(Tied):
    """The same function with one module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.second = self.first


@each_optimizer
def test_tied_modules_are_one_layer(digits, build):
    """Stepped once, with the statistics of both: the same as one module called twice."""
    model = Tied().double()
    other = Reused().double()
    other.load_state_dict(model.state_dict())
    optimizer, oracle = build(model), build(other)
    assert train(model, optimizer, digits, range(5)) == train(other, oracle, digits, range(5))
    _assert_equal(list(model.parameters()), list(other.parameters()))
    assert not torch.equal(model.first.weight, Tied().first.weight)


@each_optimizer
@pytest.mark.parametrize("interval", [2, 3])
def test_factors_move_every_T_steps(digits, build, interval):
    """In between they stay, and no statistics are formed."""
    model = Mixed()
    optimizer = build(model, T=interval)
    taps = [binding.tap for binding in optimizer._bindings]
    previous = None
    for step in range(7):
        optimizer.zero_grad()
        loss_of(model, digits, step).backward()
        due = step % interval == 0
        assert all((tap.factors() is not None) == due for tap in taps)
        optimizer.step()
        K = first_factor(optimizer.state[model.conv.weight]).clone()
        assert previous is None or torch.equal(K, previous) == (not due)
        previous = K


@each_optimizer
def test_step_on_an_empty_batch_harms_nothing(build):
    """The gradient is zero and there is no curvature: weights and factors stay finite."""
    model = nn.Linear(3, 2)
    optimizer = build(model, momentum=0.0)
    before = copied(model)
    model(torch.zeros(0, 3)).sum().backward()
    optimizer.step()
    assert not changed(model, before)
    model.zero_grad()
    model(torch.randn(4, 3)).pow(2).mean().backward()
    optimizer.step()
    assert changed(model, before) == {"weight", "bias"}
    assert all(p.isfinite().all() for p in model.parameters())


@each_optimizer
def test_factors_of_low_precision_are_measured_in_float32(build):
    """Statistics are sums of many terms: in bfloat16 256 + 1 is 256."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = build(model, preconditioner_dtype=torch.bfloat16)
    (tap,) = (binding.tap for binding in optimizer._bindings)
    x = torch.randn(600, 2)
    for row in x:
        model(row[None]).sum().backward()
    A = tap.factors().A.squeeze(0)
    expected = x.T @ x / 600
    expected = expected if A.dim() == 2 else expected.diagonal()
    torch.testing.assert_close(A.float(), expected, rtol=1e-2, atol=1e-2)
    optimizer.step()
    assert first_factor(optimizer.state[model.weight]).dtype == torch.bfloat16
