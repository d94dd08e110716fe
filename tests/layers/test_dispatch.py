"""Which modules have Kronecker factors."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tn_kfac.curvature import find_sites
from tn_kfac.layers import Layer, Refused, layer_of


class OwnLinear(nn.Linear):
    """A user's subclass."""


class OwnConv(nn.Conv2d):
    """A user's subclass."""


class OwnEmbedding(nn.Embedding):
    """A user's subclass."""


class Adapted(nn.Linear):
    """A user's subclass, with parameters of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.shift = nn.Parameter(torch.zeros(()))


class NamedConv1D(nn.Module):
    """Stands in for HuggingFace's Conv1D, which is known by its qualified name."""

    def __init__(self, features_out: int, features_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_in, features_out))
        self.bias = nn.Parameter(torch.zeros(features_out))


NamedConv1D.__module__, NamedConv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class OwnConv1D(NamedConv1D):
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
        (nn.Conv1d(4, 6, 3), (1, 6, 12)),
        (nn.Conv1d(4, 6, 3, groups=2), (2, 3, 6)),
        (nn.Conv3d(4, 6, (1, 2, 3)), (1, 6, 24)),
        (nn.ConvTranspose1d(4, 6, 3), (1, 6, 12)),
        (nn.ConvTranspose2d(2, 3, 3), (1, 3, 18)),
        (nn.ConvTranspose2d(4, 6, (2, 3), groups=2), (2, 3, 12)),
        (nn.ConvTranspose3d(2, 3, (1, 2, 3), bias=False), (1, 3, 12)),
        (nn.Embedding(4, 3), (1, 3, 4)),
        (nn.Embedding(4, 3, padding_idx=1, max_norm=1.0), (1, 3, 4)),
        (OwnEmbedding(4, 3), (1, 3, 4)),
        (nn.EmbeddingBag(4, 3), (1, 3, 4)),
        (nn.EmbeddingBag(4, 3, mode="sum", include_last_offset=True), (1, 3, 4)),
        (NamedConv1D(5, 3), (1, 5, 3)),
        (OwnConv1D(5, 3), (1, 5, 3)),
        (nn.BatchNorm1d(3), (3, 1, 1)),
        (nn.BatchNorm2d(3), (3, 1, 1)),
        (nn.BatchNorm3d(3), (3, 1, 1)),
        (nn.LayerNorm(3), (3, 1, 1)),
        (nn.LayerNorm((2, 3)), (6, 1, 1)),
        (nn.RMSNorm(3), (3, 1, 1)),
        (nn.GroupNorm(2, 4), (4, 1, 1)),
    ],
    ids=str,
)
def test_supported_modules(module, shape):
    """The geometry is that of the weight matrices, (groups, out, in) per group."""
    layer = layer_of(module)
    assert isinstance(layer, Layer)
    assert (layer.groups, layer.features_out, layer.features_in) == shape
    matrix = layer.to_matrix(module.weight)
    assert matrix.shape == shape
    assert torch.equal(layer.from_matrix(matrix, module.weight.shape), module.weight)


def test_conv1d_of_transformers():
    """The class itself, where the package is there, and not only its name."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    assert layer_of(pytorch_utils.Conv1D(5, 3)) == layer_of(NamedConv1D(5, 3))


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(3, affine=False),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.GroupNorm(2, 4, affine=False),
        nn.Bilinear(2, 3, 4),
        nn.MultiheadAttention(4, 2).out_proj,
        nn.LSTM(3, 4),
        nn.Sequential(nn.Linear(3, 3)),
        nn.ReLU(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_have_no_factors(module):
    """They are trained by the fallback; none is taken for a layer by mistake."""
    assert layer_of(module) is None


class OwnAttention(nn.MultiheadAttention):
    """A user's subclass."""


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.MultiheadAttention(4, 2), "without calling a layer"),
        (OwnAttention(4, 2, kdim=3, vdim=3), "without calling a layer"),
        (nn.Embedding(4, 3, sparse=True), "sparse gradients"),
        (nn.Embedding(4, 3, scale_grad_by_freq=True), "by frequency"),
        (OwnEmbedding(4, 3, sparse=True), "sparse gradients"),
        (nn.EmbeddingBag(4, 3, sparse=True), "sparse gradients"),
        (nn.EmbeddingBag(4, 3, scale_grad_by_freq=True), "by frequency"),
        (nn.EmbeddingBag(4, 3, mode="max"), "a maximum"),
    ],
    ids=str,
)
def test_refused_modules(module, why):
    """They say why they have no factors, though their kind is known; users are told by name."""
    layer = layer_of(module)
    assert isinstance(layer, Refused)
    assert why in layer.why
    sites, refused = find_sites(nn.ModuleDict({"part": module}))
    assert (sites, list(map(str, refused))) == ([], [f"'part' {layer.why}"])


PARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral norm of old": nn.utils.spectral_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "convolution": lambda: nn.Conv2d(2, 3, 2),
    "transposed": lambda: nn.ConvTranspose1d(2, 3, 2),
    "embedding": lambda: nn.Embedding(3, 4),
}


def _refusals(module: nn.Module) -> list[str]:
    """Why a module has no factors, next to one that keeps its own."""
    sites, refused = find_sites(nn.ModuleDict({"part": module, "plain": nn.Linear(3, 4)}))
    assert [site.name for site in sites] == ["plain"]
    return [str(refusal) for refusal in refused]


@pytest.mark.parametrize("parametrise", PARAMETRISED.values(), ids=PARAMETRISED)
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_parametrised_weights_have_no_factors(build, parametrise):
    """What is trained is not the weight that the layer multiplies with."""
    assert _refusals(parametrise(build())) == ["'part' has parametrised weights"]


@pytest.mark.parametrize(
    "module",
    [parametrizations.weight_norm(nn.Linear(3, 4), "bias"), Adapted(3, 4)],
    ids=["parametrised bias", "parameters of its own"],
)
def test_layers_with_other_parameters_have_no_factors(module):
    """A weight that something else is trained beside is not what its matrix says."""
    (reason,) = _refusals(module)
    assert reason.startswith("'part' has ")


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 4, dtype=torch.complex64),
        nn.Conv2d(2, 3, 2, dtype=torch.complex64),
        nn.ConvTranspose1d(2, 3, 2, dtype=torch.complex128),
        nn.Embedding(3, 4, dtype=torch.complex64),
    ],
    ids=str,
)
def test_complex_weights_have_no_factors(module):
    """The curvature of a real loss in a complex weight is another theory."""
    assert _refusals(module) == ["'part' has complex parameters"]


def test_norm_layers_have_factors_where_asked_for():
    """By default nothing is said of them: the fallback trains them as it always did."""
    model = nn.ModuleDict({"norm": nn.LayerNorm(3), "plain": nn.Linear(3, 4)})
    names = {norms: [site.name for site in find_sites(model, norms)[0]] for norms in (False, True)}
    assert names == {False: ["plain"], True: ["norm", "plain"]}
    assert find_sites(model)[1] == find_sites(model, norms=True)[1] == []


DIFFERENT = [
    (nn.Linear(3, 4), nn.Linear(4, 3)),
    (nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, padding=1)),
    (nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, stride=2)),
    (nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 2, dilation=2)),
    (nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")),
    (nn.Conv2d(2, 2, (1, 2)), nn.Conv2d(2, 2, (2, 1))),
    (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)),
    (nn.Conv1d(2, 2, 3), nn.ConvTranspose1d(2, 2, 3)),
    (nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1, stride=2)),
    (nn.ConvTranspose2d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3, padding=1)),
    (nn.ConvTranspose2d(2, 2, 2), nn.ConvTranspose2d(2, 2, 2, dilation=2)),
    (nn.ConvTranspose2d(2, 2, (1, 2)), nn.ConvTranspose2d(2, 2, (2, 1))),
    (nn.Linear(3, 4), NamedConv1D(4, 3)),
    (nn.Embedding(4, 3), nn.EmbeddingBag(4, 3)),
    (nn.Embedding(4, 3), nn.Embedding(4, 3, padding_idx=0)),
    (nn.EmbeddingBag(4, 3), nn.EmbeddingBag(4, 3, mode="sum")),
    (nn.EmbeddingBag(4, 3), nn.EmbeddingBag(4, 3, include_last_offset=True)),
    (nn.LayerNorm(4), nn.RMSNorm(4)),
    (nn.LayerNorm(4), nn.LayerNorm(4, eps=1e-3)),
    (nn.GroupNorm(2, 4), nn.GroupNorm(4, 4)),
    (nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=1e-3)),
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
