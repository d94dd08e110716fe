"""Copies of a tapped model, and models that change device or dtype."""

import pytest
import torch
from copies import COPIES
from reference import kfac
from reference.cases import batch_loss, example_loss
from tapping import tapped
from torch import Tensor, nn

from tn_kfac.curvature import ForwardScope, LayerTap

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


each_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)


def _tapped_model() -> tuple[nn.Sequential, LayerTap, Tensor]:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    tap = tapped(model[0])
    ForwardScope([tap]).attach(model)
    return model, tap, torch.randn(4, 3, dtype=torch.float64)


@each_copy
def test_copy_computes_the_same_and_reports_nothing(duplicate):
    """An EMA copy trains (or not) on its own: the original's statistics stay as they are."""
    model, tap, x = _tapped_model()
    batch_loss(model(x), 4).backward()
    expected = tap.factors()
    model.zero_grad()
    twin = duplicate(model)
    batch_loss(twin(2 * x), 4).backward()
    assert twin[0].weight.grad.norm() > 0
    assert model[0].weight.grad is None
    torch.testing.assert_close(tap.factors(), expected, rtol=0, atol=0)
    assert torch.equal(twin(x), model(x))


@each_copy
def test_copy_saves_no_more_than_an_untapped_model(duplicate):
    """The copy's outputs come from the layers themselves, not from a tap."""
    model, _, x = _tapped_model()
    assert type(model[0](x).grad_fn).__name__ == "TapBackward"
    assert type(duplicate(model)[0](x).grad_fn).__name__ == "AddmmBackward0"


@each_copy
def test_calling_a_copy_does_not_open_the_originals_forward_pass(duplicate):
    """A copy's forward pass in between leaves the counts of the original alone."""
    model, tap, x = _tapped_model()
    expected = kfac.layer_factors(
        model[0], list(x), lambda y, n: example_loss(torch.tanh(y), n), "expand", "batch"
    )
    twin = duplicate(model)
    output = model(x)
    twin(x)
    batch_loss(output, 4).backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.double(),
        lambda model: model.to(torch.float64),
        lambda model: model.to(memory_format=torch.channels_last).double(),
    ],
    ids=["double", "to dtype", "to memory format"],
)
def test_model_that_moves_is_still_captured(move):
    """Parameters that change dtype, and so their storage, are not lost."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh())
    tap = tapped(model[0])
    move(model)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    expected = kfac.layer_factors(
        model[0], list(x), lambda y, n: example_loss(torch.tanh(y), n), "expand", "batch"
    )
    batch_loss(model(x), 3).backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)


def test_probes_follow_the_layer_to_another_device():
    """Statistics are kept on the device that the output is on."""
    model = nn.Linear(3, 2)
    tap = tapped(model)
    assert {probe.device.type for probe in tap.probes_on(torch.device("cpu"))} == {"cpu"}
    probes = tap.probes_on(torch.device("meta"))
    assert {probe.device.type for probe in probes} == {"meta"}
    assert [tuple(probe.shape) for probe in probes] == list(tap.recipe.shapes())


def test_probes_take_no_memory():
    """A probe is an expanded scalar, whatever the size of its statistic."""
    tap = tapped(nn.Linear(1000, 1000))
    for probe in tap.probes_on(torch.device("cpu")):
        assert probe.untyped_storage().nbytes() <= 8
