"""KFAC's and EKFAC's own options, against the plain rule on dense matrices."""

import pytest
import torch
from optimizers import joint, loss_of, train, two_layers
from torch import Tensor, nn

from tn_kfac import KFAC

PLAIN = {"lr": 0.5, "momentum": 0.0, "kl_clip": None, "fallback": None, "warn_unsupported": False}


def rows(model: nn.Module, digits, step: int) -> list[tuple[Tensor, Tensor]]:
    """For each linear layer the rows (inputs, gradients of each example's own loss)."""
    x, y = digits[0][8 * step : 8 * step + 8], digits[1][8 * step : 8 * step + 8]
    inputs, outputs = [], []
    for layer in model:
        if isinstance(layer, nn.Linear):
            one = torch.ones(len(x), layer.bias is not None, dtype=x.dtype)
            inputs.append(torch.cat([x, one], 1).detach())
            x = layer(x)
            outputs.append(x)
        else:
            x = layer(x)
    loss = nn.functional.cross_entropy(x, y, reduction="sum")
    return list(zip(inputs, torch.autograd.grad(loss, outputs), strict=True))


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0) ** -exponent) @ vectors.mT


def steps(digits, count=5, model=None, **options):
    """(step, layer, gradient, change / lr, rows) of each step of each layer."""
    model = model or two_layers()
    optimizer = KFAC(model, **(PLAIN | options))
    layers = [m for m in model if isinstance(m, nn.Linear)]
    for step in range(count):
        measured = rows(model, digits, step)
        optimizer.zero_grad()
        loss_of(model, digits, step).backward()
        before = [(joint(layer), joint(layer, "data")) for layer in layers]
        optimizer.step()
        for at, (layer, (gradient, old)) in enumerate(zip(layers, before, strict=True)):
            yield step, at, gradient, (old - joint(layer, "data")) / 0.5, measured[at]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("inverse", ["eigh", "cholesky", "newton-schulz"])
@pytest.mark.parametrize("exponent", [1, 0.5])
@pytest.mark.parametrize("mode", ["factored", "each", "exact"])
@pytest.mark.parametrize(("T", "T_inverse"), [(1, 1), (2, 2), (1, 3)])
def test_the_rule(digits, inverse, exponent, mode, T, T_inverse):
    """Debiased averages, their damped inverses at their intervals, and nothing else."""
    options = {"inverse": inverse, "exponent": exponent, "damping_mode": mode}
    if (mode == "exact" and inverse != "eigh") or (exponent != 1 and inverse == "cholesky"):
        with pytest.raises(ValueError, match="inverse="):
            KFAC(two_layers(), **options)
        return
    options |= {"damping": 0.3, "T": T, "T_inverse": T_inverse, "factor_decay": 0.8}
    sums, weight, inverses = {}, {}, {}
    for step, at, gradient, change, (a, g) in steps(digits, **options):
        if step % T == 0:
            A, G = sums.get(at, (0, 0))
            sums[at] = (0.8 * A + 0.2 * a.T @ a / len(a), 0.8 * G + 0.2 * g.T @ g / len(g))
            weight[at] = 0.8 * weight.get(at, 0) + 0.2
        if step % T_inverse == 0 or (step < T_inverse and step & (step - 1) == 0):
            inverses[at] = [factor / weight[at] for factor in sums[at]]
        A, G = inverses[at]
        eyes = torch.eye(len(A), dtype=A.dtype), torch.eye(len(G), dtype=A.dtype)
        if mode == "exact":
            whole = power(torch.kron(G, A) + 0.3 * torch.kron(eyes[1], eyes[0]), exponent)
            expected = (whole @ gradient.flatten()).reshape(gradient.shape)
        else:
            pi = (A.trace() / len(A) / (G.trace() / len(G))).sqrt()
            root = 0.3**0.5
            shifts = (pi * root, root / pi) if mode == "factored" else (0.3, 0.3)
            left = power(G + shifts[1] * eyes[1], exponent)
            expected = left @ gradient @ power(A + shifts[0] * eyes[0], exponent)
        if inverse == "newton-schulz":
            assert (change - expected).norm() < 0.1 * expected.norm()
        else:
            close(change, expected)


@pytest.mark.parametrize("exponent", [1, 0.5])
def test_eigenvectors_by_orthogonal_iteration(digits, exponent):
    """inverse="qr": exact while most of an average is new, then a step from the last ones.

    Of the last layer, whose factors tell their eigenvectors (the other's have a null space).
    """
    options = {"inverse": "qr", "T_inverse": 1, "damping_mode": "exact", "damping": 0.3}
    A = G = weight = 0
    bases: list[Tensor] = []
    found = steps(digits, 6, exponent=exponent, factor_decay=0.8, **options)
    for step, at, gradient, change, (a, g) in found:
        if at == 0:
            continue
        A, G = 0.8 * A + 0.2 * a.T @ a / len(a), 0.8 * G + 0.2 * g.T @ g / len(g)
        weight = 0.8 * weight + 0.2
        factors = [A / weight, G / weight]
        if step < 2:
            bases = [torch.linalg.eigh(factor)[1] for factor in factors]
        else:
            for side, (B, Q) in enumerate(zip(factors, bases, strict=True)):
                order = (Q.T @ B @ Q).diagonal().argsort(descending=True)
                bases[side] = torch.linalg.qr((B @ Q)[:, order]).Q
        Q_A, Q_G = bases
        values = [(Q.T @ B @ Q).diagonal() for B, Q in zip(factors, bases, strict=True)]
        whole = torch.outer(values[1], values[0]) + 0.3
        close(change, Q_G @ (Q_G.T @ gradient @ Q_A / whole**exponent) @ Q_A.T)


def test_damping_may_be_scheduled(digits):
    """A callable of the step, at every step, between inverses too."""
    options = {"T": 10, "T_inverse": 10, "damping_mode": "exact"}
    found = list(steps(digits, 3, damping=lambda step: 0.1 + step, **options))
    (a, g) = found[0][4]
    A, G = a.T @ a / len(a), g.T @ g / len(g)
    eye = torch.eye(len(A) * len(G), dtype=A.dtype)
    for step, at, gradient, change, _ in found:
        if at == 0:
            whole = torch.kron(G, A) + (0.1 + step) * eye
            close(change.flatten(), torch.linalg.solve(whole, gradient.flatten()))


def test_staggered_inverses(digits):
    """Each layer has its own step of every four; before it, factors are multiples of I."""
    model = nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(3)], nn.Linear(64, 10))
    optimizer = KFAC(model, **PLAIN, stagger=True, T_inverse=4, damping=0.1)
    refreshed = []
    for step in range(12):
        train(model, optimizer, digits, [step])
        inverted = [optimizer.state[layer.weight]["inverted"] for layer in model[1:]]
        refreshed.append([int(at == step + 1) for at in inverted])
        if step == 0:
            state = optimizer.state[model[4].weight]
            assert state["A_values"].unique().numel() == 1
            mean = state["A"][0].diagonal().mean() / state["weight"][0]
            torch.testing.assert_close(state["A_values"][0, 0], mean)
    assert refreshed == [[int(at == step % 4) for at in range(4)] for step in range(12)]


def test_early_inverses_come_often(digits):
    """Averages of few batches are poor: 0, 1, 2, 4, 8, and then every ten steps."""
    model = two_layers()
    optimizer = KFAC(model, **PLAIN, T_inverse=10, damping=1.0)
    times = set()
    for step in range(31):
        train(model, optimizer, (digits[0][:64], digits[1][:64]), [step % 8])
        times.add(optimizer.state[model[1].weight]["inverted"] - 1)
    assert times == {0, 1, 2, 4, 8, 10, 20, 30}


def test_without_new_factors_there_is_no_new_inverse(digits):
    """What is due waits for them."""
    model, seen = two_layers(), []
    optimizer = KFAC(model, **PLAIN, T=4, T_inverse=3, damping=1.0)
    for step in range(12):
        before = optimizer.state[model[1].weight].get("inverted", 0)
        train(model, optimizer, digits, [step])
        if optimizer.state[model[1].weight]["inverted"] > before:
            seen.append(step)
    assert seen == [0, 4, 8]


def test_an_interval_may_be_changed(digits):
    """As schedules of other options, from the next step on."""
    model, seen = two_layers(), []
    optimizer = KFAC(model, **PLAIN, T_inverse=100, damping=1.0)
    for step in range(12):
        before = optimizer.state[model[1].weight].get("inverted", 0)
        train(model, optimizer, (digits[0][:64], digits[1][:64]), [step % 8])
        if optimizer.state[model[1].weight]["inverted"] > before:
            seen.append(step)
        if step == 5:
            optimizer.param_groups[0]["T_inverse"] = 3
    assert seen == [0, 1, 2, 4, 6, 9]


def test_a_callable_that_raises_leaves_inverses_that_are_right(digits):
    model = two_layers()
    waits = iter([1, 0])
    optimizer = KFAC(model, **PLAIN, T_inverse=lambda step: next(waits), damping=1.0)
    with pytest.raises(ValueError, match=r"T_inverse\(step\)"):
        train(model, optimizer, digits, [0])
    for layer in (model[1], model[3]):
        assert optimizer.state[layer.weight]["A_values"].unique().numel() > 1


def test_intervals_may_be_callables(digits):
    model = two_layers()
    waits = {0: 3, 3: 1, 4: 5, 9: 100}
    optimizer = KFAC(model, **PLAIN, T_inverse=lambda step: waits[step], damping=1.0)
    train(model, optimizer, digits, range(12))
    assert optimizer.state[model[1].weight]["refresh"] == 109
