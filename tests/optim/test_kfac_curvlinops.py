"""Steps of KFAC and EKFAC against curvlinops' damped inverses, in all their damping modes."""

import copy

import pytest
import torch
from curvlinops import (
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
)
from torch import Tensor, nn

from tn_kfac import KFAC

TIGHT = {"rtol": 1e-8, "atol": 1e-12}
CONV = (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2, bias=False),
        nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))  # fmt: skip
MLP = (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
MODELS = {"conv": (CONV, (2, 6, 6)), "mlp": (MLP, (4,))}
LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
}
DAMPING = {
    "factored": (0.03, {"use_heuristic_damping": True}),
    "exact": (0.03, {"use_exact_damping": True}),
    "each": (0.03, {}),
    "each of two": ((0.03, 0.2), {}),
}


def problem(
    name: str, loss: str, size: int = 7
) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """A model, its loss, and a batch (x, targets)."""
    torch.manual_seed(5)
    layers, shape = MODELS[name]
    model = copy.deepcopy(nn.Sequential(*layers)).double()
    x = torch.randn(size, *shape, dtype=torch.float64)
    target = torch.randint(3, (size,)) if loss != "mse" else torch.rand(size, 3).double()
    return model, LOSSES[loss], (x, target)


def step(model, loss_fn, batch, optimizer) -> list[Tensor]:
    """One step; the change of each parameter over the learning rate, negated."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    outputs = model(batch[0])
    optimizer.curvature(outputs, loss_fn, batch[1])
    loss_fn(outputs, batch[1]).backward()
    optimizer.step()
    lr = optimizer.param_groups[0]["lr"]
    after = model.parameters()
    return [(old - new.detach()) / lr for old, new in zip(before, after, strict=True)]


def plain(model, loss_fn, **options) -> KFAC:
    """The preconditioner and nothing else."""
    average = None if loss_fn.reduction == "sum" else "batch"
    return KFAC(model, momentum=0.0, kl_clip=None, loss_average=average, lr=0.5, **options)


def expected(operator, model, **damping) -> list[Tensor]:
    """The operator's damped inverse times the gradient."""
    inverse = KFACInverseLinearOperator(operator, **damping)
    return inverse @ [p.grad for p in model.parameters()]


@pytest.mark.parametrize("inverse", ["eigh", "cholesky", "newton-schulz"])
@pytest.mark.parametrize("damping", DAMPING)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_kfac(name, loss, fisher, approx, damping, inverse):
    if damping == "exact" and inverse != "eigh":
        pytest.skip("refused: exact damping needs eigenvalues")
    model, loss_fn, batch = problem(name, loss)
    value, modes = DAMPING[damping]
    mode, options = damping.split()[0], {"inverse": inverse, "damping": value}
    optimizer = plain(
        model, loss_fn, fisher=fisher, kfac_approx=approx, damping_mode=mode, **options
    )
    operator = KFACLinearOperator(
        model, loss_fn, list(model.parameters()), [batch], fisher_type=fisher, kfac_approx=approx,
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    loss_fn(model(batch[0]), batch[1]).backward()
    wanted = expected(operator, model, damping=value, **modes)
    for actual, target in zip(step(model, loss_fn, batch, optimizer), wanted, strict=True):
        torch.testing.assert_close(actual, target, **TIGHT)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("loss", ["mean", "sum", "mse"])
@pytest.mark.parametrize("name", MODELS)
def test_ekfac(name, loss, fisher, approx):
    """A step of zero length finds the basis, in which the next one's moments are measured."""
    if loss == "mse" and fisher == "empirical":
        pytest.skip("curvlinops counts each output of a mean as a term")
    model, loss_fn, batch = problem(name, loss, size=30)  # so that no eigenvalue is double
    optimizer = plain(model, loss_fn, fisher=fisher, kfac_approx=approx, damping=0.03, ekfac=True)
    optimizer.param_groups[0]["lr"] = 0.0
    step(model, loss_fn, batch, optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    operator = EKFACLinearOperator(
        model, loss_fn, list(model.parameters()), [batch], fisher_type=fisher, kfac_approx=approx,
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    wanted = expected(operator, model, damping=0.03, use_exact_damping=True)
    for actual, target in zip(step(model, loss_fn, batch, optimizer), wanted, strict=True):
        torch.testing.assert_close(actual, target, **TIGHT)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_newton_step_of_a_deep_linear_network(approx):
    """A block-diagonal Newton step: KFAC is the GGN of each layer, exactly."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)).double()
    loss_fn, x = nn.MSELoss(), torch.randn(40, 4, dtype=torch.float64)
    batch = (x, torch.randn(40, 2, dtype=torch.float64))
    options = {"fisher": "type-2", "kfac_approx": approx, "damping_mode": "exact"}
    optimizer = plain(model, loss_fn, damping=1e-10, **options)
    params = list(model.parameters())
    ggn = GGNLinearOperator(model, loss_fn, params, [batch], check_deterministic=False)
    exact = ggn @ torch.eye(ggn.shape[0], dtype=torch.float64)
    found = step(model, loss_fn, batch, optimizer)
    at = 0
    for layer in range(3):
        pair = slice(2 * layer, 2 * layer + 2)
        size = sum(p.numel() for p in params[pair])
        block = exact[at : at + size, at : at + size]
        at += size
        change = torch.cat([d.flatten() for d in found[pair]])
        gradient = torch.cat([p.grad.flatten() for p in params[pair]])
        torch.testing.assert_close(block @ change, gradient, rtol=1e-5, atol=1e-8)


def test_one_step_reaches_the_minimum():
    """Of one linear layer with MSE: the Newton point."""
    torch.manual_seed(3)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    options = {"fisher": "type-2", "damping_mode": "exact", "damping": 1e-12}
    optimizer = plain(model, nn.MSELoss(), **options)
    optimizer.param_groups[0]["lr"] = 1.0
    step(model, nn.MSELoss(), (x, y), optimizer)
    ones = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    exact = torch.linalg.lstsq(ones, y).solution.T
    torch.testing.assert_close(model.weight.detach(), exact[:, :4], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.bias.detach(), exact[:, 4], rtol=1e-8, atol=1e-8)
