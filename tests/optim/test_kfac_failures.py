"""What KFAC refuses by name, and what ends no run."""

import warnings

import pytest
import torch
from optimizers import Mixed, copied, loss_of, train, two_layers
from torch import nn

from tn_kfac import KFAC
from tn_kfac.structures import BlockDiagonal

PLAIN = {"lr": 0.5, "momentum": 0.0, "kl_clip": None, "fallback": None, "warn_unsupported": False}


@pytest.mark.parametrize("structure", ["triltoeplitz", "hierarchical3_4", "triltopleftdiag"])
def test_structures_without_inverses_are_refused_by_name(structure):
    model = two_layers()
    with pytest.raises(ValueError, match=rf"structure='{structure}' of layer '1'"):
        KFAC(model, structure=structure)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("beyond", "shape"), [("blocks", (1, 65, 20)), ("diagonal", (1, 65))])
def test_large_factors_are_split_and_said(digits, beyond, shape):
    model = two_layers()
    with pytest.warns(
        UserWarning, match=r"layer '1' has a factor of 65 rows, more than max_dim=20"
    ):
        optimizer = KFAC(model, max_dim=20, beyond_max_dim=beyond)
    train(model, optimizer, digits, range(2))
    assert optimizer.state[model[1].weight]["A"].shape == shape
    assert optimizer.state[model[3].weight]["A"].shape == (1, 7, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KFAC(two_layers(), structure=BlockDiagonal(20), max_dim=20)
        KFAC(two_layers(), structure={"1": ("block20diagonal", "dense"), "*": "dense"}, max_dim=64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("inverse", ["eigh", "qr", "cholesky", "newton-schulz"])
def test_injected_factors_end_no_run(digits, inverse, value):
    """One warning names the factor; the layer keeps its last inverse, the others go on."""
    model = Mixed()
    optimizer = KFAC(model, T_inverse=1, inverse=inverse, damping=0.1)
    train(model, optimizer, digits, range(2))
    state = optimizer.state[model.conv.weight]
    keys = [key for key in state if key.startswith("A_")]
    state["A"][0, 0, 0] = value
    kept = {key: state[key].clone() for key in keys}
    before = copied(model)
    with pytest.warns(UserWarning, match=r"factors without an inverse.*A of 'conv'") as caught:
        train(model, optimizer, digits, range(2, 6))
    assert len(caught) == 1
    assert all(torch.equal(state[key], kept[key]) for key in keys)
    for name, p in model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name])


@pytest.mark.parametrize("inverse", ["eigh", "qr", "cholesky", "newton-schulz"])
@pytest.mark.parametrize("damping", [0.0, 1e-12])
def test_rank_deficient_factors_end_no_run(digits, inverse, damping):
    """Two samples, and no damping to speak of."""
    model = two_layers().float()
    options = {"inverse": inverse, "damping": damping, "damping_mode": "each", "lr": 1e-4}
    optimizer = KFAC(model, T_inverse=1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model, digits, 0, size=2).backward()
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("inverse", ["eigh", "qr", "cholesky", "newton-schulz"])
def test_bad_curvature_changes_no_average(digits, inverse):
    """A step whose curvature is not finite leaves averages and their weight as they were."""
    model = two_layers()
    optimizer = KFAC(model, inverse=inverse, damping=0.1)
    train(model, optimizer, digits, range(2))
    state = optimizer.state[model[1].weight]
    kept = {key: state[key].clone() for key in ("A", "G", "weight")}
    bad = digits[0][16:24].clone()
    bad[0, 0, 0] = float("nan")
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(bad), digits[1][16:24]).backward()
    optimizer.step()
    assert all(torch.equal(state[key], value) for key, value in kept.items())


CONFLICTS = [
    ({"damping_mode": "exact", "inverse": "cholesky"}, "inverse='cholesky'"),
    ({"ekfac": True, "inverse": "newton-schulz"}, "inverse='newton-schulz'"),
    ({"ekfac": True, "damping_mode": "factored"}, "damping_mode='factored'"),
    ({"ekfac": True, "fisher": "forward-only"}, "forward-only"),
    ({"exponent": 0.5, "inverse": "cholesky"}, "inverse='cholesky'"),
    ({"damping": (0.1, 0.2)}, "is a pair"),
    ({"lag": 10}, "lag=10 must be less than T_inverse=10"),
    ({"lag": 1, "T_inverse": 1}, "lag=1 must be less than T_inverse=1"),
    ({"stagger": True, "T_inverse": lambda step: 3}, "stagger=True"),
]


@pytest.mark.parametrize(("options", "message"), CONFLICTS)
def test_options_that_do_not_fit_are_refused(options, message):
    model = two_layers()
    with pytest.raises(ValueError, match=message):
        KFAC(model, **options)
    assert not any(m._forward_hooks for m in model.modules())
