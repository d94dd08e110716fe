"""Grouped convolutions: one exact SINGD per channel group, against a brute-force one."""

import pytest
import torch
from reference import kfac
from reference.singd import MatrixSINGD
from torch import nn

from benchmarks.published import PUBLISHED
from tn_kfac import SINGD

STEPS = 10
OPTIONS = {
    "lr": 0.05,
    "momentum": 0.9,
    "damping": 1e-2,
    "alpha1": 0.5,
    "lr_cov": 0.1,
    "weight_decay": 0.01,
}


def _example_loss(y: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the channels averaged over space, y (channels, h, w)."""
    return nn.functional.cross_entropy(y.mean((1, 2))[None], label[None])


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("ikfac", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    "structures", [("diagonal", "diagonal"), ("dense", "dense"), ("diagonal", "dense")]
)
def test_each_group_follows_its_own_singd(digits, structures, approx, ikfac, normalised):
    """Weights, bias and factors of every group equal those of an independent SINGD."""
    groups, interval = 2, 2
    images, labels = digits
    images = torch.cat([images, 2 - 3 * images.flip(2)], dim=1)[:, :, ::2, ::2]  # (n, 2, 4, 4)
    conv = nn.Conv2d(2, 10, (3, 2), stride=(2, 1), padding=1, groups=groups).double()
    parameters = zip(conv.weight.detach().chunk(groups), conv.bias.chunk(groups), strict=True)
    flags = {"normalised": normalised, "ikfac": ikfac}
    oracles = [
        MatrixSINGD(
            torch.cat([w.flatten(1), b[:, None]], 1).detach(), structures, **OPTIONS, **flags
        )
        for w, b in parameters
    ]
    optimizer = SINGD(
        conv,
        **(PUBLISHED | OPTIONS | {"T": interval}),
        structures=structures,
        kfac_approx=approx,
        kfac_like=ikfac,
        normalize_lr_cov=normalised,
    )
    for step in range(STEPS):
        batch = range(step * 5, step * 5 + 5)
        x, y = images[batch], labels[batch]
        A, G = kfac.layer_factors(
            conv, list(x), lambda out, n, y=y: _example_loss(out, y[n]), approx, "batch"
        )
        optimizer.zero_grad()
        nn.functional.cross_entropy(conv(x).mean((2, 3)), y).backward()
        weights = conv.weight.grad.flatten(1).chunk(groups)
        biases = conv.bias.grad.chunk(groups)
        for g, oracle in enumerate(oracles):
            gradient = torch.cat([weights[g], biases[g][:, None]], dim=1)
            oracle.step(gradient, (A[g], G[g]) if step % interval == 0 else None)
        optimizer.step()

    expected = torch.cat([oracle.weight for oracle in oracles])
    actual = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], dim=1)
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-9, atol=1e-12)
    state = optimizer.state[conv.weight]
    for side, name in zip("KC", structures, strict=True):
        expected = torch.stack([oracle.state[side] for oracle in oracles])
        actual = torch.diag_embed(state[side]) if name == "diagonal" else state[side]
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(expected[0], expected[1], rtol=1e-3), "groups must differ"
