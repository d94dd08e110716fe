"""A fraction of the batch: an unbiased measure, whose samples take turns."""

import copy

import torch
from optimizers import Mixed, is_identity, loss_of, train, two_layers

from tn_kfac import SINGD

OPTIONS = {"lr": 0.05, "T": 1, "lr_cov": 0.1, "fallback": None, "warn_unsupported": False}


def test_fraction_is_unbiased(digits):
    """Over the turns, the mean of the statistics of every third sample is that of all."""
    model = two_layers()
    optimizer = SINGD(model, **OPTIONS, structure="dense", curvature_fraction=1 / 3)
    twin = SINGD(copy.deepcopy(model), **OPTIONS, structure="dense")
    taps = [optimizer._bindings[0].tap, twin._bindings[0].tap]
    factors = []
    for turn in range(3):
        optimizer.zero_grad()
        taps[0].turn = turn
        loss_of(model, digits, 0, 12).backward()
        factors.append(taps[0].factors())
    loss_of(twin._model, digits, 0, 12).backward()
    whole = taps[1].factors()
    for at in range(2):
        mean = sum(f[at] for f in factors) / 3
        torch.testing.assert_close(mean, whole[at], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(factors[0][at], whole[at], rtol=1e-3)


def test_fraction_takes_turns_at_any_interval(digits):
    """Each update measures the next samples, though steps in between do not."""
    model = two_layers()
    options = OPTIONS | {"T": 4, "lr": 0.0, "curvature_fraction": 1 / 2}
    optimizer = SINGD(model, **options, structure="dense")
    turns = []
    for step in range(9):
        turns.append(optimizer._bindings[0].tap.turn)
        train(model, optimizer, digits, [step])
    assert turns == [0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_fraction_of_every_kind_of_layer(digits):
    """Convolutions, embeddings, norms (measured whole) and batches smaller than the step."""
    model = Mixed().double()
    optimizer = SINGD(model, T=1, lr=0.05, curvature_fraction=1 / 4, norms=True,
                      warn_unsupported=False)  # fmt: skip
    optimizer.zero_grad()
    loss_of(model, digits, 0, 3).backward()
    optimizer.step()
    train(model, optimizer, digits, range(3))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not is_identity(optimizer.state[model.conv.weight]["K"])
