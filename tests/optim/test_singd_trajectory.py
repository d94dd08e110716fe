"""Our SINGD takes the steps of the package `singd` 0.0.5, to rounding, on real digits."""

import ast
import copy
import inspect
from itertools import product

import pytest
import torch
from reference.networks import DigitNet
from singd.optim.optimizer import SINGD as PeerSINGD
from torch import nn

from benchmarks.published import PUBLISHED
from tn_kfac import SINGD

STEPS, BATCH, TOLERANCE = 30, 16, 1e-9
CHOSEN = {"lr": 0.02, "momentum": 0.9, "damping": 1e-2, "alpha1": 0.5, "lr_cov": 0.05, "T": 1}
BASE = PUBLISHED | CHOSEN
PAIRS = {
    "diagonal": ("diagonal", "diagonal"),
    "dense": ("dense", "dense"),
    "mixed": ("diagonal", "dense"),
    "mixed reversed": ("dense", "diagonal"),
}


def known(options: dict) -> dict:
    """What the package takes of SINGD's options."""
    return {k: v for k, v in options.items() if k in inspect.signature(PeerSINGD).parameters}


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, average) -> torch.Tensor:
    if average is None:
        return nn.functional.cross_entropy(model(images), labels, reduction="sum")
    return nn.functional.cross_entropy(model(images), labels)


def _train(model: nn.Module, optimizer, data, average) -> list[float]:
    images, labels = data
    losses = []
    for step in range(STEPS):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        loss = _loss(model, images[batch], labels[batch], average)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _assert_same_trajectory(data, options, bias=True, peer_options=None):
    """Train two copies; parameters, factors and losses agree, and the factors have moved."""
    torch.manual_seed(1)
    ours = DigitNet(bias).double()
    theirs = copy.deepcopy(ours)
    options = BASE | options
    average = options.get("loss_average", "batch")
    optimizer = SINGD(ours, **options)
    peer = PeerSINGD(theirs, **known(options | (peer_options or {})))

    losses = _train(ours, optimizer, data, average)
    peer_losses = _train(theirs, peer, data, average)

    assert losses == pytest.approx(peer_losses, rel=TOLERANCE)
    assert len(set(losses)) == STEPS
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert _relative(p.detach(), q.detach()) < TOLERANCE, name
    structures = dict(zip(("K", "C"), options["structures"], strict=True))
    for module, name in peer.module_names.items():
        state = optimizer.state[ours.get_submodule(name).weight]
        for key, expected in (("K", peer.Ks), ("C", peer.Cs)):
            theirs_dense = expected[name].to_dense()
            actual = state[key].squeeze(0)
            actual = actual.diag() if structures[key] == "diagonal" else actual
            assert _relative(actual, theirs_dense) < TOLERANCE, (module, key)
            identity = torch.eye(len(theirs_dense), dtype=torch.float64)
            moved = _relative(theirs_dense, identity)
            assert moved > 1e-2, (name, key, moved)


GRID = list(
    product(("diagonal", "dense", "mixed"), ("expand", "reduce"), (True, False), (1, 3), (0, 1))
)


@pytest.mark.parametrize(("pair", "approx", "bias", "interval", "normalised"), GRID)
def test_equals_singd_package(digits, pair, approx, bias, interval, normalised):
    """Structures, approximations, biases, update intervals and normalised lr_cov."""
    options = {
        "structures": PAIRS[pair],
        "kfac_approx": approx,
        "T": interval,
        "normalize_lr_cov": bool(normalised),
    }
    _assert_same_trajectory(digits, options, bias)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("pair", ["mixed", "mixed reversed"])
def test_kfac_like_equals_singd_package(digits, pair, approx, normalised):
    """IKFAC: traces are 1, and alpha1 has no effect (the package wants it to be 0)."""
    options = {
        "structures": PAIRS[pair],
        "kfac_approx": approx,
        "kfac_like": True,
        "normalize_lr_cov": normalised,
    }
    # normalize_lr_cov scales by 1 − alpha1, which IKFAC takes as 0.
    _assert_same_trajectory(digits, options, peer_options={"alpha1": 0.0})


OTHER_OPTIONS = {
    "weight decay": {"weight_decay": 0.1},
    "no momentum": {"momentum": 0.0},
    "no momentum of the factors": {"alpha1": 0.0},
    "no momentum of the factors, normalised": {"alpha1": 0.0, "normalize_lr_cov": True},
    "scheduled lr_cov": {"lr_cov": lambda step: 0.1 / (1 + step)},
    "scheduled lr_cov, T=3": {"lr_cov": lambda step: 0.02 * (1 + step % 4), "T": 3},
    "no damping": {"damping": 0.0},
    "sum loss": {"loss_average": None, "lr": 2e-4, "lr_cov": 2e-3},
    "loss averaged over positions too": {"loss_average": "batch+sequence"},
    "explicit dtypes": {"preconditioner_dtype": (torch.float64, torch.float64)},
    "interval longer than a few steps": {"T": 7},
}


@pytest.mark.parametrize(("pair", "approx"), [("mixed", "expand"), ("mixed reversed", "reduce")])
@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_each_option_equals_singd_package(digits, name, pair, approx):
    """Every other hyper-parameter that both implementations have."""
    options = {"structures": PAIRS[pair], "kfac_approx": approx} | OTHER_OPTIONS[name]
    _assert_same_trajectory(digits, options)


def test_published_options_are_the_defaults_of_the_package(digits):
    """With them, arguments that are not given are the package's (but for the structure)."""
    ours = {name: p.default for name, p in inspect.signature(SINGD).parameters.items()} | PUBLISHED
    theirs = inspect.signature(PeerSINGD).parameters
    shared = set(theirs) - {"structures", "preconditioner_dtype"}
    assert shared <= set(ours)
    assert {k: ours[k] for k in shared} == {k: theirs[k].default for k in shared}
    assert ours["fallback"] == "sgd" and not ours["nesterov"] and ours["update_rms"] is None


def test_docstring_says_what_was_published():
    said = (SINGD.__doc__ or "").partition(">>> ")[2].partition("\n\n")[0]
    call = ast.parse("".join(said.split("...")), mode="eval").body
    assert isinstance(call, ast.Call)
    assert {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} == PUBLISHED
