"""What adaptive hyper-parameters need, and what they say if it is missing."""

import pytest
import torch
from adapting import LOSS, batch, make, net, step
from optimizers import hooks_on
from torch import Tensor, nn

from tn_kfac import KFAC


@pytest.mark.parametrize("calls", [0, 2])
def test_it_needs_one_call_a_step(calls):
    model = net()
    optimizer = make(model, fisher="empirical", adaptive=True)
    data = batch()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    for _ in range(max(calls, 1)):
        outputs = model(data[0])
        if calls:
            optimizer.curvature(outputs, LOSS, data[1])
        LOSS(outputs, data[1]).backward()
    with pytest.raises(RuntimeError, match=rf"one optimizer\.curvature.*got {calls}"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


WRONG = [
    ({"adaptive": "speed"}, "adaptive must be"),
    ({"adaptive": 3}, "adaptive must be"),
    ({"adaptive": True, "damping": lambda step: 0.1}, "one number to start from"),
    ({"adaptive": True, "nesterov": True}, "nesterov=True"),
    ({"adaptive": "lr", "graft": "sgd"}, "graft='sgd'"),
    ({"adaptive": "momentum", "precondition": "momentum"}, "precondition='momentum'"),
    ({"adaptive": True, "weight_decay": 0.1}, "weight_decay=0.1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_does_not_fit_is_refused(options, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        KFAC(model, **options)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("how", ["scaled", "picked", "earlier"])
def test_other_outputs_are_refused(how):
    """They would be modelled by something else than the loss is of."""
    model = net()
    optimizer = make(model, adaptive=True)
    data = batch()
    outputs = model(data[0])
    if how == "earlier":
        model(data[0])
    wrong = {"scaled": outputs / 3, "picked": outputs[:], "earlier": outputs}[how]
    with pytest.raises(ValueError, match="outputs must be the tensor that model"):
        optimizer.curvature(wrong, LOSS, data[1])


class Stubborn(torch.autograd.Function):
    """An operation without a forward-mode derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def test_missing_forward_mode_is_explained():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return Stubborn.apply(self.layer(x))

    model = Model()
    with pytest.raises(RuntimeError, match="need forward-mode derivatives of the model"):
        step(model, make(model, adaptive=True), batch())


def test_a_skipped_step_leaves_no_batch_behind():
    """The scaler met an infinite gradient, and the model's own zero_grad follows."""
    model = net()
    optimizer = make(model, adaptive=True)
    scaler = torch.amp.GradScaler("cpu")
    for at in range(3):
        model.zero_grad()
        outputs = model(batch(at)[0])
        optimizer.curvature(outputs, LOSS, batch(at)[1])
        scaler.scale(LOSS(outputs, batch(at)[1]) * (float("inf") if at == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_refused_step_changes_nothing():
    """Two batches: the error comes before factors are updated."""
    model = net()
    optimizer = make(model, adaptive=True)
    for _ in range(2):
        outputs = model(batch()[0])
        optimizer.curvature(outputs, LOSS, batch()[1])
        LOSS(outputs, batch()[1]).backward()
    with pytest.raises(RuntimeError, match="got 2"):
        optimizer.step()
    assert not any(optimizer.state.values())


def test_groups_cannot_choose():
    model = net()
    with pytest.raises(ValueError, match="adaptive='lr' of a group"):
        KFAC(model, [{"params": model.parameters(), "adaptive": "lr"}])
