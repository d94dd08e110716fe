"""Training habits: averaged, copied and pickled models; models that move while they train."""

import copy
from collections.abc import Callable

import pytest
import torch
from copies import COPIES
from optimizers import Mixed, each_optimizer, factors_of, is_fresh, loss_of, train
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.float64),
}
AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "SWA": AveragedModel,
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "EMA with buffers": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True
    ),
}


def _twins() -> tuple[Mixed, Mixed]:
    model = Mixed()
    return model, copy.deepcopy(model)


def _tensors(optimizer) -> list[Tensor]:
    states = (state for state in optimizer.state.values())
    return [v.clone() for state in states for v in state.values() if isinstance(v, Tensor)]


def _assert_same(model, optimizer, twin, oracle) -> None:
    """Parameters and state, bit by bit."""
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    ours, theirs = _tensors(optimizer), _tensors(oracle)
    assert len(ours) == len(theirs) > 0
    assert all(map(torch.equal, ours, theirs))


@each_optimizer
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averaged_model_is_inert(digits, build, average):
    """Built after the optimizer, updated and trained on beside it: nothing is recorded."""
    model, twin = _twins()
    optimizer, oracle = build(model), build(twin)
    averaged = average(model)
    losses, snapshots = [], []
    for step in range(4):
        losses += train(model, optimizer, digits, [step])
        averaged.update_parameters(model)
        snapshots.append([p.detach().clone() for p in model.parameters()])
        counts = [binding.tap.factors() for binding in optimizer._bindings]
        loss_of(averaged, digits, step + 7).backward()
        assert counts == [None] * len(counts)
        assert [binding.tap.factors() for binding in optimizer._bindings] == counts
    assert losses == train(twin, oracle, digits, range(4))
    _assert_same(model, optimizer, twin, oracle)
    assert all(p.grad is not None for p in averaged.parameters())
    if average is AVERAGES["SWA"]:
        for p, *values in zip(averaged.parameters(), *snapshots, strict=True):
            torch.testing.assert_close(p.detach(), torch.stack(values).mean(0))


@each_optimizer
def test_mean_teacher(digits, build):
    """The average gives targets between the student's forward and backward pass.

    The oracle's average is made before the optimizer, so of a model without hooks.
    """
    model, twin = _twins()
    average = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
    bounded = {"lr": 0.01, "gentle": True}
    optimizer, plain = build(model, **bounded), AveragedModel(twin, **average)
    oracle = build(twin, **bounded)
    pairs = [(model, optimizer, AveragedModel(model, **average)), (twin, oracle, plain)]
    losses = []
    for student, own, teacher in pairs:
        for step in range(4):
            x = digits[0][8 * step : 8 * step + 8].float()
            own.zero_grad()
            outputs = student(x)
            with torch.no_grad():
                targets = teacher(x + 0.1)
            (outputs - targets + 0.01 * teacher(x)).square().sum(1).mean().backward()
            own.step()
            teacher.update_parameters(student)
            losses.append(outputs.sum().item())
    assert losses[:4] == losses[4:] and losses[0] != losses[3]
    _assert_same(model, optimizer, twin, oracle)
    assert all(p.grad is not None for p in pairs[0][2].parameters())


@each_optimizer
def test_swa_with_its_schedule_and_batch_norm_update(digits, build):
    """torch's recipe: SWALR, update_parameters, update_bn at the end; then inference."""
    model, twin = _twins()
    optimizer, oracle = build(model), build(twin)
    averaged = AveragedModel(model)
    schedules = [SWALR(o, swa_lr=0.01, anneal_epochs=3) for o in (optimizer, oracle)]
    losses, expected = [], []
    for step in range(5):
        losses += train(model, optimizer, digits, [step])
        averaged.update_parameters(model)
        schedules[0].step()
        expected += train(twin, oracle, digits, [step])
        schedules[1].step()
    mean = averaged.module.norm.running_mean.clone()
    update_bn([digits[0][:64].float()], averaged)
    assert losses == expected
    _assert_same(model, optimizer, twin, oracle)
    assert not torch.equal(averaged.module.norm.running_mean, mean)
    assert averaged.eval()(digits[0][:4].float()).isfinite().all()
    assert all(abs(group["lr"] - 0.01) < 1e-9 for group in optimizer.param_groups)


@each_optimizer
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_in_the_middle_of_a_step(digits, build, duplicate):
    """Copied between backward and step, used, and trained: the original goes on undisturbed."""
    model, twin = _twins()
    optimizer, oracle = build(model), build(twin)
    train(model, optimizer, digits, range(2))
    optimizer.zero_grad()
    loss_of(model, digits, 2).backward()
    other = duplicate(model)
    loss_of(other, digits, 5).backward()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    optimizer.step()
    train(model, optimizer, digits, range(3, 5))
    train(twin, oracle, digits, range(5))
    _assert_same(model, optimizer, twin, oracle)


@each_optimizer
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copy_is_trained_by_an_optimizer_of_its_own(digits, build, duplicate):
    """A fresh optimizer on a copy of a hooked model acts as on a model never hooked."""
    model, twin = _twins()
    optimizer = build(model)
    other = duplicate(model)
    expected = train(twin, build(twin), digits, range(3))
    own = build(other)
    before = [p.detach().clone() for p in model.parameters()]
    assert train(other, own, digits, range(3)) == expected
    assert all(map(torch.equal, other.parameters(), twin.parameters()))
    assert all(map(torch.equal, model.parameters(), before))
    assert not optimizer.state
    with pytest.warns(UserWarning, match="no layer captured curvature"):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()  # what the copy did is not taken for the model's


class Digits(nn.Sequential):
    """Convolutions with all kinds of strides, and a head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, groups=2),
            nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(54, 10),
        )  # fmt: skip


def _digits_twins(dtype: torch.dtype) -> tuple[Digits, Digits]:
    model = Digits().to(dtype)
    return model, copy.deepcopy(model)


@each_optimizer
@pytest.mark.parametrize("moved_at", [0, 2])
def test_channels_last_after_construction(digits, build, moved_at):
    """model.to(memory_format=channels_last), before or amid training, inputs and all."""
    model, twin = _digits_twins(torch.float64)
    optimizer, oracle = build(model, weight_decay=0.01), build(twin, weight_decay=0.01)
    losses = train(model, optimizer, digits, range(moved_at))
    model.to(memory_format=torch.channels_last)
    last = digits[0].to(memory_format=torch.channels_last), digits[1]
    losses += train(model, optimizer, last, range(moved_at, 6))
    assert losses == pytest.approx(train(twin, oracle, digits, range(6)), rel=1e-9)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[2].weight.is_contiguous()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@each_optimizer
@pytest.mark.parametrize(("fallback", "moved_at"), [("sgd", 0), ("sgd", 3), ("adamw", 0)])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_double_after_construction(digits, build, move, moved_at, fallback):
    """The steps are those of float64 but for the float32 factors; with sgd also amid training.

    (torch.optim.AdamW itself cannot go on when its parameters change dtype amid training.)
    """
    model, twin = _digits_twins(torch.float32)
    options = {"fallback": fallback, "lr": 0.01, "gentle": True}
    optimizer, oracle = build(model, **options), build(twin.double(), **options)
    losses = train(model, optimizer, digits, range(moved_at))
    move(model)
    losses += train(model, optimizer, digits, range(moved_at, 6))
    assert losses == pytest.approx(train(twin, oracle, digits, range(6)), rel=1e-4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.dtype == torch.float64
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@each_optimizer
@pytest.mark.parametrize("after", [False, True], ids=["before", "after construction"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_bfloat16_weights_with_float32_factors(digits, build, approx, after):
    """Weights in bfloat16, factors in float32 and finite; the loss falls as in float32."""
    model, twin = _digits_twins(torch.float32)
    if not after:
        model.bfloat16()
    options = {"kfac_approx": approx, "lr": 0.02, "gentle": True}
    optimizer, oracle = build(model, **options), build(twin, **options)
    model.bfloat16()
    epochs = [*range(8)] * 6
    losses, expected = (train(*pair, digits, epochs) for pair in ((model, optimizer),
                                                                  (twin, oracle)))  # fmt: skip
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    assert sum(losses[-8:]) == pytest.approx(sum(expected[-8:]), rel=0.25)
    for layer in (model[0], model[2], model[6]):
        assert layer.weight.dtype == torch.bfloat16
        state = optimizer.state[layer.weight]
        for factor in factors_of(state):
            assert factor.dtype == torch.float32
            assert factor.isfinite().all() and not is_fresh(factor)
        assert state["momentum_buffer"].dtype == torch.bfloat16
