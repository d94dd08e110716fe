"""Inverses that are computed beside the training, and used a number of steps later."""

import copy
import gc
import threading
import time
from io import BytesIO

import pytest
import torch
from optimizers import Mixed, copied, joint, loss_of, train, two_layers
from test_kfac import PLAIN, power, rows
from torch import Tensor, nn

from tn_kfac import KFAC
from tn_kfac.optim import pending
from tn_kfac.optim.refresh import decompose

VARIANTS = {
    "eigh": {},
    "qr": {"inverse": "qr"},
    "cholesky": {"inverse": "cholesky"},
    "newton-schulz": {"inverse": "newton-schulz"},
    "roots": {"inverse": "newton-schulz", "exponent": 0.5},
    "ekfac": {"ekfac": True, "structure": "diagonal"},
    "ekfac of the batch": {"ekfac": "ema", "T": 2},
    "blocks": {"structure": "block3diagonal", "damping_mode": "each"},
    "staggered": {"stagger": True, "T_inverse": 5, "lag": 3},
    "callables": {"T_inverse": lambda step: 3 + step % 2, "damping": lambda step: 0.3 / (1 + step)},
    "never on time": {"T_inverse": lambda step: 2, "lag": 5},
}
LAGGED = {"lr": 0.05, "damping": 0.1, "kl_clip": None, "T_inverse": 4, "lag": 2}
STEPS = 14
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def build(model: nn.Module, *groups, **options) -> KFAC:
    return KFAC(model, *groups, **(LAGGED | options))


def threads() -> list[threading.Thread]:
    """Those of optimizers."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("tn_kfac")]


def few(digits) -> tuple[Tensor, Tensor]:
    """Enough samples for all steps."""
    return digits[0][: 8 * STEPS], digits[1][: 8 * STEPS]


def due(step: int, interval: int) -> bool:
    return step % interval == 0 or (step < interval and step & (step - 1) == 0)


@pytest.mark.parametrize("inverse", ["eigh", "cholesky"])
@pytest.mark.parametrize("mode", ["factored", "each"])
@pytest.mark.parametrize(("T", "T_inverse", "lag"), [(1, 4, 3), (1, 6, 2), (2, 4, 3), (1, 2, 1)])
def test_the_trajectory(digits, inverse, mode, T, T_inverse, lag):
    """Plain SGD along gradients times inverses of averages that are `lag` steps old."""
    model = two_layers()
    twin = copy.deepcopy(model)
    options = {"inverse": inverse, "damping_mode": mode, "damping": 0.3, "factor_decay": 0.8}
    optimizer = KFAC(model, **(PLAIN | options), T=T, T_inverse=T_inverse, lag=lag)
    layers = [m for m in twin if isinstance(m, nn.Linear)]
    sums, used, later, weight = [(0, 0)] * 2, [None] * 2, {}, 0
    for step in range(STEPS):
        measured = rows(twin, digits, step)
        twin.zero_grad()
        loss_of(twin, digits, step).backward()
        if step % T == 0:
            pairs = zip(sums, measured, strict=True)
            sums = [
                (0.8 * A + 0.2 * a.T @ a / len(a), 0.8 * G + 0.2 * g.T @ g / len(g))
                for (A, G), (a, g) in pairs
            ]
            weight = 0.8 * weight + 0.2
        used = later.pop(step, used)
        if due(step, T_inverse) and step % T == 0:
            new = [[factor / weight for factor in pair] for pair in sums]
            following = next(s for s in range(step + 1, 99) if due(s, T_inverse))
            if step:
                later[min(step + lag, following)] = new
            else:
                used = new
        for layer, (A, G) in zip(layers, used, strict=True):
            pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt() if mode == "factored" else 1
            root = 0.3**0.5 if mode == "factored" else 0.3
            left = power(G + root / pi * torch.eye(len(G), dtype=G.dtype), 1)
            change = (
                left @ joint(layer) @ power(A + root * pi * torch.eye(len(A), dtype=A.dtype), 1)
            )
            with torch.no_grad():
                width = layer.weight.shape[1]
                layer.weight -= 0.5 * change[:, :width]
                if layer.bias is not None:
                    layer.bias -= 0.5 * change[:, width]
        train(model, optimizer, digits, [step])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def run(digits, steps: range, started=None, save=range(0), **options):
    """(model, optimizer) after the steps, from a state if given; saves before some of them."""
    torch.manual_seed(0)
    model = Mixed()
    optimizer = build(model, warn_unsupported=False, **options)
    if started is not None:
        started.seek(0)
        weights, state = torch.load(started)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    for step in steps:
        if step in save:
            optimizer.state_dict()
        train(model, optimizer, few(digits), [step])
    return model, optimizer


def assert_same(ours, theirs) -> None:
    """Parameters and states, bit by bit."""
    assert all(map(torch.equal, ours[0].parameters(), theirs[0].parameters()))
    states = [pair[1].state_dict()["state"] for pair in (ours, theirs)]
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        for key, value in state.items():
            assert torch.equal(*map(torch.as_tensor, (value, states[1][index][key]))), key


@each_variant
def test_resumed_at_any_step(digits, options):
    """Also while inverses are pending, beside a run that never saved anything."""
    whole = run(digits, range(STEPS), **options)
    pending_at = set()
    for stop in range(STEPS):
        first = run(digits, range(stop), **options)
        buffer = BytesIO()
        torch.save([first[0].state_dict(), first[1].state_dict()], buffer)
        if any(state.get("adopt", -1) >= 0 for state in first[1].state.values()):
            pending_at.add(stop)
        assert_same(run(digits, range(stop, STEPS), buffer, **options), whole)
    assert 3 < len(pending_at) < STEPS


@each_variant
def test_speed_and_saving_do_not_matter(digits, options, monkeypatch):
    """A slow thread, and states that are taken at every step."""
    whole = run(digits, range(STEPS), **options)
    assert_same(run(digits, range(STEPS), save=range(STEPS), **options), whole)

    def slowly(*arguments):
        time.sleep(0.03)
        return decompose(*arguments)

    monkeypatch.setattr(pending, "decompose", slowly)
    assert_same(run(digits, range(STEPS), **options), whole)


@each_variant
def test_it_is_late(digits, options):
    """And so another run than without a lag."""
    ours = run(digits, range(STEPS), **options)[0]
    theirs = run(digits, range(STEPS), **(options | {"lag": 0}))[0]
    assert not torch.equal(ours.conv.weight, theirs.conv.weight)


def test_groups_with_lags_and_intervals_of_their_own(digits):
    """Each layer's inverse changes at its group's steps alone, though sizes are equal."""
    model = nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64, bias=False) for _ in range(3)])
    apart = [{}, {"lag": 1}, {"T_inverse": 6, "lag": 0}]
    groups = [
        {"params": layer.parameters(), **own} for layer, own in zip(model[1:], apart, strict=True)
    ]
    optimizer = build(model, groups)
    seen = [[], [], []]
    for step in range(12):
        before = [optimizer.state[layer.weight].get("A_basis") for layer in model[1:]]
        before = [None if basis is None else basis.clone() for basis in before]
        train(model, optimizer, few(digits), [step])
        for steps, layer, old in zip(seen, model[1:], before, strict=True):
            if old is None or not torch.equal(old, optimizer.state[layer.weight]["A_basis"]):
                steps.append(step)
    assert seen == [[0, 2, 4, 6, 10], [0, 2, 3, 5, 9], [0, 1, 2, 4, 6]]


def test_what_is_pending_goes_with_a_loaded_state(digits):
    """The loaded run's own is used in its place."""
    model, optimizer = run(digits, range(3))
    buffer = BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    whole = run(digits, range(3, 9), buffer)
    train(model, optimizer, few(digits), [7, 8])
    assert optimizer._pending._begun
    buffer.seek(0)
    weights, state = torch.load(buffer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert not optimizer._pending._begun
    train(model, optimizer, few(digits), range(3, 9))
    assert_same((model, optimizer), whole)


def test_the_lag_may_be_changed(digits):
    """From 0 and back, as schedules of other options; what is pending stays so."""
    model = two_layers()
    optimizer = KFAC(model, **PLAIN, T_inverse=100, damping=1.0)
    changes, lags = [], {8: 3, 17: 0}
    for step in range(33):
        optimizer.param_groups[0]["lag"] = lags.get(step, optimizer.param_groups[0]["lag"])
        before = optimizer.state[model[1].weight].get("A_basis", torch.zeros(())).clone()
        train(model, optimizer, few(digits), [step % STEPS])
        if not torch.equal(before, optimizer.state[model[1].weight]["A_basis"]):
            changes.append(step)
    assert changes == [0, 1, 2, 4, 11, 19, 32]


class Broken(RuntimeError):
    """Raised on the thread."""


@pytest.mark.parametrize("call", ["step", "state_dict"])
def test_what_the_thread_raises_is_raised_to_the_caller(digits, monkeypatch, call):
    """By the step that would use the inverse, or by state_dict; then training goes on."""
    model, optimizer = run(digits, range(4))
    state = optimizer.state[model.conv.weight]

    def fails(*arguments):
        raise Broken

    with monkeypatch.context() as context:
        context.setattr(pending, "decompose", fails)
        train(model, optimizer, few(digits), [4])
    kept = state["A_basis"].clone()
    train(model, optimizer, few(digits), [5])
    with pytest.raises(Broken):
        train(model, optimizer, few(digits), [6]) if call == "step" else optimizer.state_dict()
    assert torch.equal(state["A_basis"], kept)
    optimizer.state_dict()
    before = copied(model)
    train(model, optimizer, few(digits), range(7, 12))
    assert not torch.equal(state["A_basis"], kept)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("inverse", ["eigh", "cholesky", "newton-schulz"])
def test_injected_factors_end_no_run(digits, inverse):
    """One warning, from the step that would use the inverse; the last one is kept."""
    model, optimizer = run(digits, range(6), inverse=inverse)
    state = optimizer.state[model.conv.weight]
    train(model, optimizer, few(digits), range(6, 8))
    state["A"][0, 0, 0] = float("nan")
    kept = {key: state[key].clone() for key in state if key.startswith("A_")}
    with pytest.warns(UserWarning, match=r"factors without an inverse.*A of 'conv'") as caught:
        train(model, optimizer, few(digits), range(8, STEPS))
    assert len(caught) == 1
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_thread_comes_late_and_goes(digits):
    """With the first delayed inverse; closed, or with an optimizer that nobody closed."""
    others = threads()
    _, optimizer = run(digits, range(1))
    assert not set(threads()) - set(others)
    train(_, optimizer, few(digits), range(1, 3))
    (thread,) = set(threads()) - set(others)
    for _ in range(2):
        optimizer.close()
        assert not thread.is_alive()
    _, optimizer = run(digits, range(3))
    (thread,) = set(threads()) - set(others)
    del optimizer, _
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_without_a_lag_there_is_nothing_of_it(digits):
    """No thread, and no tensors beside those in use."""
    others = threads()
    model, optimizer = run(digits, range(6), lag=0)
    assert not set(threads()) - set(others)
    keys = optimizer.state[model.conv.weight].keys()
    assert "adopt" not in keys and not any(key.startswith("next_") for key in keys)
