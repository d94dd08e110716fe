"""`kronecker_factors` against curvlinops and BackPACK, on what all of them support."""

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, DiagGGNExact
from curvlinops import GGNLinearOperator, KFACLinearOperator
from torch import Tensor, nn

from tn_kfac import kronecker_factors, to_curvlinops

# BackPACK hooks a first layer whose input takes no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

TIGHT = {"rtol": 1e-8, "atol": 1e-12}
CONV = nn.Sequential(
    nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Tanh(),
    nn.Flatten(), nn.Linear(8, 3),
).double()  # fmt: skip


class Tokens(nn.Module):
    """Linear layers with weight sharing, and a mean over the shared axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean(1)


MODELS = {"conv": (CONV, (2, 6, 5)), "tokens": (Tokens().double(), (4, 4))}
LOSSES = {
    "cross_entropy": nn.CrossEntropyLoss(),
    "cross_entropy sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
    "bce": nn.BCEWithLogitsLoss(),
}


def batches(model: str, loss: nn.Module, sizes=(4, 3)) -> list[tuple[Tensor, Tensor]]:
    shape = MODELS[model][1]
    data = []
    for size in sizes:
        x = torch.randn(size, *shape, dtype=torch.float64)
        target = torch.rand(size, 3, dtype=torch.float64)
        target = target.round() if isinstance(loss, nn.BCEWithLogitsLoss) else target
        data.append((x, target.argmax(1) if isinstance(loss, nn.CrossEntropyLoss) else target))
    return data


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_factors_equal_those_of_curvlinops(name, loss, fisher, approx):
    model, loss_fn = MODELS[name][0], LOSSES[loss]
    data = batches(name, loss_fn)
    params = list(model.parameters())
    oracle = KFACLinearOperator(
        model, loss_fn, params, data, fisher_type=fisher, kfac_approx=approx,
        separate_weight_and_bias=False, check_deterministic=False,
    )  # fmt: skip
    average = None if loss_fn.reduction == "sum" else "batch"
    factors = kronecker_factors(
        model, loss_fn, data, fisher=fisher, approx=approx, loss_average=average
    )
    ours = to_curvlinops(factors, model)
    vector = [torch.randn_like(p) for p in params]
    scale = oracle_scale(loss_fn, fisher)
    for actual, expected in zip(ours @ vector, oracle @ vector, strict=True):
        torch.testing.assert_close(actual * scale, expected, **TIGHT)


def oracle_scale(loss: nn.Module, fisher: str) -> float:
    """For an empirical Fisher they count each of the 3 outputs of a mean as a loss term."""
    counted = isinstance(loss, (nn.MSELoss, nn.BCEWithLogitsLoss)) and loss.reduction == "mean"
    return 3.0 if fisher == "empirical" and counted else 1.0


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_factors_equal_kflr_of_backpack(loss):
    """Without weight sharing: Linear layers only."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double()
    loss_fn = LOSSES[loss]
    x = torch.randn(6, 4, dtype=torch.float64)
    target = torch.rand(6, 3, dtype=torch.float64)
    target = target.argmax(1) if loss == "cross_entropy" else target
    ours = kronecker_factors(model, loss_fn, [(x, target)], fisher="type-2")
    extended, extended_loss = extend(model), extend(LOSSES[loss].__class__())
    with backpack(KFLR()):
        extended_loss(extended(x), target).backward()
    for name, layer in (("0", model[0]), ("2", model[2])):
        G, A = layer.weight.kflr
        features = A.shape[0]
        A_ours, G_ours = ours[name].A[0, :features, :features], ours[name].G[0]
        torch.testing.assert_close(torch.kron(G_ours, A_ours), torch.kron(G, A), **TIGHT)
        torch.testing.assert_close(G_ours, layer.bias.kflr[0], **TIGHT)
    model.zero_grad()


def test_diagonal_of_one_example_is_that_of_the_ggn_of_backpack():
    """KFAC makes no error on one example without weight sharing."""
    model = extend(nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)).double())
    x, target = torch.randn(1, 4, dtype=torch.float64), torch.tensor([2])
    with backpack(DiagGGNExact()):
        extend(nn.CrossEntropyLoss())(model(x), target).backward()
    ours = kronecker_factors(
        model, "cross_entropy", [(x, target)], fisher="type-2", structure="diagonal"
    )
    for name, layer in (("0", model[0]), ("2", model[2])):
        joint = ours[name].G[0][:, None] * ours[name].A[0][None, :]
        torch.testing.assert_close(joint[:, :-1], layer.weight.diag_ggn_exact, **TIGHT)
        torch.testing.assert_close(joint[:, -1], layer.bias.diag_ggn_exact, **TIGHT)


@pytest.mark.parametrize(("approx", "per_token"), [("expand", True), ("reduce", False)])
def test_kfac_is_the_ggn_of_deep_linear_networks(approx, per_token):
    """https://arxiv.org/abs/2311.00636, Propositions 1 and 2: exact for the right setting.

    Expand, where every token has a loss of its own; reduce, where the network averages
    tokens that are alike (for one example, or equal ones, the reduced rows tell all).
    """
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double()
    if per_token:
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        flat = (x.reshape(10, 3), torch.zeros(10, 2, dtype=torch.float64))
        data = [(x, torch.zeros(5, 2, 2, dtype=torch.float64))]
        network: nn.Module = model
        ggn_data = [flat]
    else:
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        network = nn.Sequential(model, Mean()).double()
        data = ggn_data = [(x, torch.zeros(5, 2, dtype=torch.float64))]
    params = list(model.parameters())
    loss_fn = nn.MSELoss()
    ours = to_curvlinops(
        kronecker_factors(network, loss_fn, data, fisher="type-2", approx=approx), network
    )
    exact = GGNLinearOperator(network, loss_fn, params, ggn_data, check_deterministic=False)
    for at, p in enumerate(params):
        vector = [torch.zeros_like(q) for q in params]
        vector[at] = torch.randn_like(p)
        torch.testing.assert_close((ours @ vector)[at], (exact @ vector)[at], **TIGHT)


class Mean(nn.Module):
    """Mean over the shared axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_sampled_labels_approach_the_ggn():
    model = MODELS["tokens"][0]
    data = batches("tokens", LOSSES["cross_entropy"])
    generator = torch.Generator().manual_seed(0)
    exact = kronecker_factors(model, "cross_entropy", data, fisher="type-2")
    sampled = kronecker_factors(model, "cross_entropy", data, samples=3000, generator=generator)
    for name, factors in exact.items():
        torch.testing.assert_close(sampled[name].A, factors.A, **TIGHT)
        off = (sampled[name].G - factors.G).norm() / factors.G.norm()
        assert off < 0.1


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    model[2].weight.requires_grad_(False)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    seen = []

    def progress(data):
        for batch in data:
            seen.append(batch)
            yield batch

    data = [
        (torch.randn(4, 3), torch.tensor([0, 1, 0, 1])),
        ((torch.randn(2, 3),), torch.tensor([0, 1])),
    ]
    factors = kronecker_factors(
        model, "cross_entropy", data, norms=True, structure=("diagonal", "dense"), progress=progress
    )
    assert len(seen) == 2 and set(factors) == {"0", "1", "2"}
    assert factors["0"].A.shape == (1, 4) and factors["0"].G.shape == (1, 2, 2)
    assert factors["2"].A.shape == (1, 1)
    assert factors["1"].A.shape == (2, 1) and factors["1"].G.shape == (2, 2, 2)
    assert all(p.grad is None for p in model.parameters())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"approx": "both"}, ValueError, "approx.*'both'"),
        ({"fisher": "exact"}, ValueError, "fisher.*'exact'"),
        ({"loss_average": "mean"}, ValueError, "loss_average.*'mean'"),
        ({"fisher": "empirical", "loss_average": None}, ValueError, "reduction='mean'"),
        ({"structure": "round"}, ValueError, "structure.*'round'"),
        ({"model": 3}, TypeError, "model.*int"),
        ({"data": []}, ValueError, "data is empty"),
        ({"loss_fn": nn.L1Loss()}, TypeError, "fisher='empirical'"),
        ({"samples": 0}, ValueError, "samples"),
    ],
    ids=str,
)
def test_bad_input(options, error, words):
    model = nn.Linear(3, 2)
    arguments = {
        "loss_fn": nn.CrossEntropyLoss(),
        "data": [(torch.ones(2, 3), torch.tensor([0, 1]))],
    }
    with pytest.raises(error, match=words):
        kronecker_factors(**({"model": model} | arguments | options))
    assert not model._forward_hooks
