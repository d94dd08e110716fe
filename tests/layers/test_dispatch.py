"""Which modules have Kronecker factors."""

import pytest
import torch
from torch import nn

from tn_kfac.layers import Layer, layer_of


class OwnLinear(nn.Linear):
    """A user's subclass."""


class OwnConv(nn.Conv2d):
    """A user's subclass."""


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(3, 5), (1, 5, 3)),
        (OwnLinear(3, 5, bias=False), (1, 5, 3)),
        (nn.Conv2d(4, 6, (2, 3)), (1, 6, 24)),
        (nn.Conv2d(4, 6, (2, 3), groups=2), (2, 3, 12)),
        (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 2, 9)),
        (OwnConv(4, 6, 1), (1, 6, 4)),
    ],
    ids=str,
)
def test_supported_modules(module, shape):
    """The geometry is that of the weight matrices, (groups, out, in) per group."""
    layer = layer_of(module)
    assert isinstance(layer, Layer)
    assert (layer.groups, layer.features_out, layer.features_in) == shape
    assert layer.to_matrix(module.weight).shape == shape


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(3),
        nn.LayerNorm(3),
        nn.Embedding(4, 3),
        nn.Bilinear(2, 3, 4),
        nn.MultiheadAttention(4, 2),
        nn.MultiheadAttention(4, 2).out_proj,
        nn.LSTM(3, 4),
        nn.Sequential(nn.Linear(3, 3)),
        nn.ConvTranspose2d(2, 3, 3),
        nn.ReLU(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_have_no_factors(module):
    """They are trained by the fallback; none is taken for a layer by mistake."""
    assert layer_of(module) is None


DIFFERENT = [
    (nn.Linear(3, 4), nn.Linear(4, 3)),
    (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1)),
    (nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, stride=2)),
    (nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 2, dilation=2)),
    (nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")),
    (nn.Conv2d(2, 2, (1, 2)), nn.Conv2d(2, 2, (2, 1))),
    (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)),
]


@pytest.mark.parametrize("layers", DIFFERENT, ids=str)
def test_layers_that_compute_differently_differ(layers):
    """Plans are cached by geometry, so a hyper-parameter must never be left out."""
    first, second = map(layer_of, layers)
    assert first != second


def test_bias_and_values_do_not_matter():
    """Geometry is about shapes: the same for any weight, with or without a bias."""
    with_bias, without = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
    assert not torch.equal(with_bias.weight, without.weight)
    assert layer_of(with_bias) == layer_of(without)
