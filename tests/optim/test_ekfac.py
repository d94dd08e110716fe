"""EKFAC: second moments in the eigenbasis, against those of each example's gradient."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizers import joint, loss_of, two_layers
from test_kfac import PLAIN, close, rows
from torch import Tensor, nn

from tn_kfac import KFAC


@pytest.mark.parametrize("structure", ["dense", "diagonal", "block5diagonal"])
@pytest.mark.parametrize("ekfac", ["exact", "ema"])
@pytest.mark.parametrize("lag", [0, 1])
def test_second_moments(digits, structure, ekfac, lag):
    """Averages of squares in the basis of the step before, carried into each new basis."""
    model = two_layers()
    options = {"ekfac": ekfac, "structure": structure, "damping": 0.2, "factor_decay": 0.7}
    optimizer = KFAC(model, **(PLAIN | options | {"T_inverse": 2, "lag": lag}))
    layer = model[1]
    state, moments, weight = optimizer.state[layer.weight], 0, 0.0
    recipe = optimizer._bindings[0].tap.recipe
    spaces = (recipe.input_structure, recipe.output_structure)
    bases = None
    for step in range(5):
        (a, g) = rows(model, digits, step)[0]
        optimizer.zero_grad()
        loss_of(model, digits, step).backward()
        gradient, old = joint(layer), joint(layer, "data")
        optimizer.step()
        if bases is not None:
            Q_A, Q_G = bases
            each = torch.einsum("no,ni->noi", g, a)
            squares = (Q_G.T @ (each if ekfac == "exact" else gradient) @ Q_A).square()
            squares = squares.mean(0) if ekfac == "exact" else squares
            moments, weight = 0.7 * moments + 0.3 * squares, 0.7 * weight + 0.3
        state = optimizer.state[layer.weight]
        new = [
            space.to_dense(state[f"{side}_basis"])[0].clone()
            for side, space in zip("AG", spaces, strict=True)
        ]
        if bases is not None:
            whole = bases[1] @ torch.eye(7, dtype=a.dtype), bases[0]
            turned = torch.kron(new[1].T @ whole[0], new[0].T @ whole[1])
            moments = torch.diagonal(turned @ torch.diag(moments.flatten()) @ turned.T)
            moments = moments.reshape(7, 65)
            values = moments / weight
        elif ekfac == "ema":  # the first gradient's, in the first basis
            moments, weight = 0.3 * (new[1].T @ gradient @ new[0]).square(), 0.3
            values = moments / weight
        else:
            values = state["G_values"][0][:, None] * state["A_values"][0][None, :]
        bases = new
        expected = new[1] @ ((new[1].T @ gradient @ new[0]) / (values + 0.2)) @ new[0].T
        close((old - joint(layer, "data")) / 0.5, expected)


class Shared(nn.Module):
    """Layers of all kinds with rows: convolutions with groups, and shared positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 2, bias=False)
        self.line = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(torch.tanh(self.up(torch.tanh(self.conv(x))))).sum((1, 2))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@given(batch=st.integers(1, 4), loss=st.sampled_from(["mean", "sum"]), seed=st.integers(0, 99))
def test_moments_of_every_layer_are_those_of_each_examples_gradient(approx, batch, loss, seed):
    torch.manual_seed(seed)
    model = Shared().double()
    x, y = torch.randn(batch, 2, 7, 7, dtype=torch.float64), torch.randint(3, (batch,))
    average = "batch" if loss == "mean" else None
    options = {"ekfac": True, "kfac_approx": approx, "loss_average": average, "lr": 0.0}
    optimizer = KFAC(model, **(PLAIN | options | {"T_inverse": lambda step: 100}))
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, reduction=loss).backward()
        optimizer.step()
    copy_of = copy.deepcopy(model)
    each = []
    for at in range(batch):
        copy_of.zero_grad()
        nn.functional.cross_entropy(copy_of(x[at : at + 1]), y[at : at + 1]).backward()
        each.append({n: p.grad.clone() for n, p in copy_of.named_parameters()})
    for binding in optimizer._bindings:
        recipe, state = binding.tap.recipe, optimizer.state[binding.parameters[0]]
        Q_A = recipe.input_structure.to_dense(state["A_basis"])
        Q_G = recipe.output_structure.to_dense(state["G_basis"])
        total = torch.zeros_like(state["moments"])
        name = binding.site.name
        for gradients in each:
            bias = gradients.get(f"{name}.bias")
            matrix = recipe.layer.joined(gradients[f"{name}.weight"], bias)
            total += (Q_G.mT @ matrix @ Q_A).square()
        total = total / batch if loss == "mean" else total
        close(state["moments"] / state["moments_weight"], total)


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_first_step_in_a_new_basis_has_moments(batch):
    """Kronecker eigenvalues alone would divide rounding noise by rounding noise."""
    torch.manual_seed(1)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    model = nn.Sequential(*layers, nn.LayerNorm(6), nn.Linear(6, 3))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = KFAC(
        model, lr=1e-2, inverse="qr", ekfac="ema", exponent=0.5, damping=1e-16, kl_clip=None,
        precondition="momentum", average_momentum=True, nesterov=True, fallback="adamw",
        warn_unsupported=False,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(batch, 6)).float()
    (outputs - torch.randn(batch, 3)).square().mean().backward()
    optimizer.step()
    moved = [(p - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True)]
    assert 0 < max(moved) < 0.05
