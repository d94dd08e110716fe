"""Every learning-rate scheduler of torch drives all groups, as it drives torch.optim.SGD."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import Mixed, changed, copied, each_optimizer, loss_of
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}


def _seen(optimizer: Optimizer) -> list[tuple[float, float]]:
    """(lr, momentum) of all groups."""
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


@each_optimizer
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_is_that_of_sgd(digits, build, fallback, name):
    """lr (and a cycled momentum) of every group, step by step."""
    model = Mixed()
    optimizer = build(
        model,
        [{"params": model.head.parameters(), "lr": 0.02}, {"params": model.conv.parameters()},
         {"params": model.norm.parameters(), "lr": 0.03}],
        fallback=fallback, lr=0.05,
    )  # fmt: skip
    clones = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    oracle = torch.optim.SGD(
        [{"params": [p], "lr": lr} for p, lr in zip(clones, (0.02, 0.05, 0.03), strict=True)],
        lr=0.05,
        momentum=0.9,
    )
    schedule, expected = SCHEDULERS[name](optimizer), SCHEDULERS[name](oracle)
    values = []
    for step in range(7):
        optimizer.zero_grad()
        loss = loss_of(model, digits, step)
        loss.backward()
        optimizer.step()
        clones[0].grad = torch.ones(1)
        oracle.step()
        arguments = [1.0] if name == "ReduceLROnPlateau" else []
        schedule.step(*arguments)
        expected.step(*arguments)
        values.append(_seen(optimizer))
        assert values[-1] == _seen(oracle)
    assert len({str(value) for value in values}) > 1, "the schedule must do something"


@each_optimizer
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_steps_use_the_scheduled_rate(digits, build, fallback):
    """With lr 0 nothing moves; with the next rate all does."""
    model = Mixed()
    optimizer = build(model, fallback=fallback)
    schedule = schedulers.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    for expected in (set(), {name for name, _ in model.named_parameters()}):
        before = copied(model)
        optimizer.zero_grad()
        loss_of(model, digits, 0).backward()
        optimizer.step()
        schedule.step()
        assert changed(model, before) == expected


@each_optimizer
def test_learning_rate_may_be_a_tensor(digits, build):
    """A tensor takes the same steps as the number, and may be changed in place."""
    trajectories = []
    for as_tensor in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        optimizer = build(model, lr=torch.tensor(0.05) if as_tensor else 0.05)
        for step in range(4):
            for group in optimizer.param_groups:
                if as_tensor:
                    group["lr"].fill_(0.1 / (1 + step))
                else:
                    group["lr"] = 0.1 / (1 + step)
            optimizer.zero_grad()
            loss_of(model, digits, step).backward()
            optimizer.step()
        trajectories.append(list(copied(model).values()))
    torch.testing.assert_close(*trajectories, rtol=1e-5, atol=1e-6)
