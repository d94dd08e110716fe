"""Adaptive learning rate, momentum and damping, against the exact quadratic model."""

import copy
import itertools

import pytest
import torch
from adapting import LOSS, batch, flat, make, net, step
from curvlinops import GGNLinearOperator
from optimizers import hooks_on
from torch import Tensor, nn

from tn_kfac.optim.adaptive import DECAY, EVERY, coefficients


def damped_ggn(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """F + 0.1 I, dense, by curvlinops."""
    params = list(model.parameters())
    ggn = GGNLinearOperator(model, LOSS, params, [data], check_deterministic=False)
    eye = torch.eye(ggn.shape[0], dtype=torch.float64)
    return ggn @ eye + 0.1 * eye


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
        step(model, optimizer, data)
        delta = flat(params) - before
        slope = F @ delta + gradient
        assert gradient @ delta < 0
        assert abs(slope @ delta) < 1e-9 * (delta @ F @ delta)
        if last is not None:
            assert abs(slope @ last) < 1e-9 * (delta @ F @ delta)
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
