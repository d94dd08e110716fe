"""Adaptive learning rate, momentum and damping, against the exact quadratic model."""

import copy
import itertools

import pytest
import torch
from curvlinops import GGNLinearOperator
from optimizers import hooks_on
from torch import Tensor, nn

from tn_kfac import KFAC
from tn_kfac.optim.adaptive import DECAY, EVERY, coefficients

LOSS = nn.MSELoss()


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x.sum(1), x[:, 2] ** 2], 1)


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def damped_ggn(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """F + 0.1 I, dense, by curvlinops."""
    params = list(model.parameters())
    ggn = GGNLinearOperator(model, LOSS, params, [data], check_deterministic=False)
    eye = torch.eye(ggn.shape[0], dtype=torch.float64)
    return ggn @ eye + 0.1 * eye


def step(model, optimizer, data) -> float:
    optimizer.zero_grad()
    outputs = model(data[0])
    optimizer.curvature(outputs, LOSS, data[1])
    loss = LOSS(outputs, data[1])
    loss.backward()
    optimizer.step()
    return loss.item()


def make(model, **options) -> KFAC:
    return KFAC(model, **({"fisher": "type-2", "T_inverse": 1, "damping": 0.1} | options))


def test_update_minimises_the_damped_quadratic_model():
    """Of all combinations of the new direction and the last update; F is curvlinops' GGN."""
    model = net()
    optimizer = make(model, adaptive=("lr", "momentum"))
    last = None
    for at in range(4):
        data = batch(at)
        params = list(model.parameters())
        F = damped_ggn(model, data)
        before = flat(params)
        model.zero_grad()
        LOSS(model(data[0]), data[1]).backward()
        gradient = flat(p.grad for p in params)
        twin = copy.deepcopy(model)
        step(model, optimizer, data)
        delta = flat(params) - before
        slope = F @ delta + gradient
        assert gradient @ delta < 0
        assert abs(slope @ delta) < 1e-9 * (delta @ F @ delta)
        if last is not None:
            assert abs(slope @ last) < 1e-9 * (delta @ F @ delta)
        assert type(twin[0]) is nn.Linear
        last = delta


@pytest.mark.parametrize("adaptive", ["lr", "momentum"])
def test_one_of_the_two_alone(adaptive):
    """The other one is the group's."""
    model = net()
    optimizer = make(model, adaptive=adaptive, lr=0.3, momentum=0.1)
    deltas = []
    for at in range(3):
        data = batch(at)
        params = list(model.parameters())
        F = damped_ggn(model, data)
        before = flat(params)
        step(model, optimizer, data)
        gradient = flat(p.grad for p in params)
        deltas.append(flat(params) - before)
        if at and adaptive == "lr":
            rest = deltas[-1] - 0.1 * deltas[-2]
            assert abs((F @ deltas[-1] + gradient) @ rest) < 1e-9 * (rest @ F @ rest)
        if at and adaptive == "momentum":
            assert abs((F @ deltas[-1] + gradient) @ deltas[-2]) < 1e-9


@pytest.mark.parametrize(
    "options",
    [{"kl_clip": None}, {"kl_clip": 1e-4}, {"nesterov": True}, {"precondition": "momentum"},
     {"graft": "sgd"}, {"weight_decay": 0.1}],
)  # fmt: skip
def test_damping_alone_leaves_the_plain_step(options):
    """Whatever its options are, until the damping changes after five."""
    model = net()
    twin = copy.deepcopy(model)
    options |= {"lr": 0.05, "damping_mode": "exact"}
    optimizer, plain = make(model, adaptive="damping", **options), make(twin, **options)
    data = batch()
    for _ in range(EVERY):
        step(model, optimizer, data)
        step(twin, plain, data)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    found = torch.as_tensor(optimizer.param_groups[0]["damping"]).item()
    assert any(found == pytest.approx(0.1 * DECAY**power) for power in (-EVERY, 0, EVERY))
    assert plain.param_groups[0]["damping"] == 0.1


@pytest.mark.parametrize(("model", "grows"), [("quadratic", False), ("wrong", True)])
def test_damping_follows_the_reduction_ratio(model, grows):
    """Where the model is exact the ratio is one; where a step makes things worse it grows."""
    network = nn.Linear(5, 3).double()
    options = {"lr": 1.0, "momentum": 0.0, "kl_clip": None}
    if model == "wrong":
        network = nn.Sequential(network, nn.Linear(3, 3).double(), nn.Linear(3, 3).double())
        options["lr"] = 30.0
    optimizer = make(network, adaptive="damping", damping=1.0, **options)
    for at in range(2 * EVERY):
        step(network, optimizer, batch(at))
    damping = torch.as_tensor(optimizer.param_groups[0]["damping"]).item()
    assert damping == pytest.approx(DECAY ** (-2 * EVERY if grows else 2 * EVERY))


def test_it_learns_faster_than_without():
    """On batches of a small regression, without a rate to choose."""
    losses = {}
    for adaptive in (False, True):
        model = net()
        options = {"adaptive": True} if adaptive else {"lr": 0.1, "kl_clip": None}
        optimizer = make(model, damping=1.0, **options)
        for _ in range(60):
            losses[adaptive] = step(model, optimizer, batch())
    assert losses[True] < 0.5 * losses[False]


def test_parameters_of_the_fallback_follow_their_rule():
    """They are no part of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = make(model, adaptive=True, lr=0.1, momentum=0.0)
    data = batch()
    running = model[1].running_mean.clone()
    for at in range(EVERY):
        before = model[1].weight.detach().clone()
        step(model, optimizer, data)
        change = before - model[1].weight.detach()
        torch.testing.assert_close(change, 0.1 * model[1].weight.grad)
        assert int(model[1].num_batches_tracked) == at + 1, "products are no training passes"
    assert not torch.equal(running, model[1].running_mean)


def test_resumed_run_is_the_uninterrupted_one():
    model = net()
    optimizer = make(model, adaptive=True)
    for at in range(7):
        step(model, optimizer, batch(at))
    resumed, state = copy.deepcopy(model), optimizer.state_dict()
    other = make(resumed, adaptive=True)
    other.load_state_dict(state)
    for at in range(7, 12):
        assert step(model, optimizer, batch(at)) == step(resumed, other, batch(at))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


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


def test_hooks_are_removed_and_copies_are_inert():
    model = net()
    with make(model, adaptive=True) as optimizer:
        twin = copy.deepcopy(model)
        step(model, optimizer, batch())
        LOSS(twin(batch()[0]), batch()[1]).backward()
    assert hooks_on(model) == 0


def test_coefficients_of_parallel_directions():
    """The last update is left out, and nothing is divided by zero."""
    matrix = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    c = coefficients(matrix, torch.tensor([-4.0, -4.0]), None, None)
    assert c.tolist() == [2.0, 0.0]
    assert coefficients(torch.zeros(1, 1), torch.zeros(1), None, 0.9).tolist() == [0.0]


def test_a_step_that_raises_the_loss_is_taken_back():
    """The damping grows at once, and then there is descent."""
    model = net()
    optimizer = make(model, adaptive=True, damping=1e-8)
    data = batch()
    for _ in range(3):
        step(model, optimizer, data)
    for p in model.parameters():  # a last update that helps nobody, and curvature that is wrong
        optimizer.state[p]["delta"] = 100 * torch.randn_like(p)
    losses = [step(model, optimizer, data) for _ in range(40)]
    assert all(new <= old for old, new in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_small_losses_do_not_blow_up():
    """Where the model fits its batches the quadratic model promises what cannot be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3))
    optimizer = make(model, adaptive=True, fisher="type-2", damping=0.01, T_inverse=5)
    x = torch.randn(24, 5)
    y = x.argmax(1) % 3
    for at in range(150):
        part = slice(8 * (at % 3), 8 * (at % 3) + 8)
        optimizer.zero_grad()
        outputs = model(x[part])
        optimizer.curvature(outputs, "cross_entropy", y[part])
        loss = nn.functional.cross_entropy(outputs, y[part])
        loss.backward()
        optimizer.step()
        assert loss.item() < 100
    assert loss.item() < 0.5


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
