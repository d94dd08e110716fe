"""Factors of every layer that is called often, shared, or given batches of any shape."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from checking import CHOICES, amounts, assert_factors, check_drawn, freeze
from curvature.tapping import tapped
from hypothesis import strategies as st
from reference import definition, kfac
from reference.cases import LayerCase, batch_loss, layer_cases
from reference.other_cases import bag_batches, look_up_cases, norm_cases
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tn_kfac.curvature import ForwardScope

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

ANY_CASE = st.one_of(layer_cases(), look_up_cases(), norm_cases())


def _changed(case: LayerCase, times: int) -> LayerCase:
    """Another batch of the same shape."""
    x = case.x
    if x.is_floating_point():
        return replace(case, x=torch.cos(x + times) * 1.5)
    return replace(case, x=(x + times) % case.module.num_embeddings)


class Calls(nn.Module):
    """Calls layers on a batch each, in one forward pass."""

    def __init__(self, cases: list[LayerCase]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self) -> list[Tensor]:
        return [case.outputs() for case in self.cases]


def _check_calls(case, calls, tied, approx, loss_average, names, frozen) -> None:
    use_weight, use_bias = freeze(case, frozen)
    cases = [_changed(case, times) for times in range(calls)]
    if tied:
        for other in cases[1:]:
            other.module = copy.deepcopy(case.module)
            for name, parameter in case.module.named_parameters():
                setattr(other.module, name, parameter)
    examples = len(case.outputs())
    rows = [definition.rows(each, first=n * examples) for n, each in enumerate(cases)]
    terms = kfac.loss_terms(loss_average, examples, rows[0].positions)

    modules = dict.fromkeys(each.module for each in cases)
    tap = tapped(*modules, approx=approx, loss_average=loss_average, structures=names)
    model = Calls(cases)
    ForwardScope([tap]).attach(model)
    losses = [batch_loss(y, terms, first=n * examples) for n, y in enumerate(model())]
    torch.stack(losses).sum().backward()
    assert_factors(tap, definition.factors(rows, approx, terms, use_weight, use_bias), names)


@amounts(120, 600)
def test_several_calls_in_one_forward_pass(amount):
    """Of one module, or of several with the same parameters: rows add up, samples do not."""
    strategies = {"case": ANY_CASE, "calls": st.integers(2, 3), "tied": st.booleans()}
    check_drawn(amount, _check_calls, **strategies, **CHOICES)


@st.composite
def _batches(draw) -> list[LayerCase]:
    """Batches of any shapes for one layer: the layer of the first one."""
    first = draw(ANY_CASE)
    module, dim = first.module, _shared_dim(first)
    if isinstance(module, nn.EmbeddingBag):
        return [first, *draw(st.lists(bag_batches(module), min_size=1, max_size=2))]
    cases = [first]
    for times in range(draw(st.integers(1, 2))):
        other = _changed(first, times + 1)
        if dim is not None:
            other.x = torch.cat([other.x] * draw(st.integers(1, 2)), dim=dim)
        if first.batched and draw(st.booleans()):
            other.x = torch.cat([other.x, other.x[:1]])
        cases.append(other)
    if isinstance(module, nn.modules.conv._ConvNd):
        # An example without a batch dimension among batches.
        cases += [replace(case, x=case.x[0], batched=False) for case in cases[:1] if case.batched]
    return cases


def _shared_dim(case: LayerCase) -> int | None:
    """A dimension that may have any size in each batch, if the layer has one."""
    x, module = case.x, case.module
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Embedding)):
        return -1 if x.dim() and not case.kwargs else None  # the output's size fits one shape
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return 0 if case.batched else None
    if isinstance(module, (nn.Linear, Conv1D)):
        return 1 if x.dim() > 2 else None
    return -1 if x.dim() > 2 else None


def _check_accumulation(cases, approx, loss_average, names, frozen) -> None:
    use_weight, use_bias = freeze(cases[0], frozen)
    sizes = [len(case.outputs()) for case in cases]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    rows = [definition.rows(case, first) for case, first in zip(cases, starts, strict=True)]
    each = [kfac.loss_terms(loss_average, len(r.a), r.positions) for r in rows]
    terms = 1 if loss_average is None else sum(each)

    module = cases[0].module
    tap = tapped(module, approx=approx, loss_average=loss_average, structures=names)
    for case, first in zip(cases, starts, strict=True):
        batch_loss(case.outputs(), terms, first).backward()
    assert_factors(tap, definition.factors(rows, approx, terms, use_weight, use_bias), names)


@amounts(120, 600)
def test_batches_of_different_shapes(amount):
    """Every row has the same weight, of however large a batch; so has every loss term."""
    check_drawn(amount, _check_accumulation, cases=_batches(), **CHOICES)


def _input(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return torch.arange(math.prod(shape)).reshape(shape) % module.num_embeddings
    return torch.randn(shape, dtype=torch.float64)


LAYERS = [
    (nn.Linear(3, 2), (2, 3)),
    (nn.Linear(3, 2), (2, 4, 3)),
    (Conv1D(2, 3), (2, 4, 3)),
    (nn.Conv1d(2, 4, 3, groups=2, padding=1), (2, 2, 5)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"), (2, 2, 4, 4)),
    (nn.Conv3d(1, 2, 2, stride=2), (2, 1, 4, 4, 3)),
    (nn.ConvTranspose1d(2, 4, 3, groups=2, padding=1), (2, 2, 5)),
    (nn.ConvTranspose2d(2, 2, 3, stride=2, output_padding=1), (2, 2, 3, 3)),
    (nn.ConvTranspose3d(1, 2, 2), (2, 1, 2, 2, 3)),
    (nn.Embedding(4, 3, padding_idx=1), (2, 3)),
    (nn.Embedding(4, 3), (3,)),
    (nn.EmbeddingBag(4, 3, mode="sum", padding_idx=1), (2, 3)),
    (nn.EmbeddingBag(4, 3, mode="mean"), (2, 3)),
    (nn.LayerNorm((2, 3)), (2, 4, 2, 3)),
    (nn.RMSNorm(3), (2, 3)),
    (nn.GroupNorm(2, 4), (2, 4, 3)),
    (nn.BatchNorm1d(3), (3, 3)),
    (nn.BatchNorm2d(3).eval(), (2, 3, 2, 2)),
]


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["dense", "diagonal"])
@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=str)
def test_empty_batch_adds_nothing(module, shape, name, approx):
    """Neither rows nor loss terms; factors of nothing but empty batches are zero, never NaN."""
    module, x = copy.deepcopy(module).double(), _input(module, shape)
    tap = tapped(module, approx=approx, structures=(name, name))
    y = module(x[:0])
    assert len(y) == 0
    y.sum().backward()
    for factor in tap.factors():
        assert torch.equal(factor, torch.zeros_like(factor))
    batch_loss(module(x), len(x)).backward()
    together = tap.factors()
    tap.clear()
    batch_loss(module(x), len(x)).backward()
    for actual, expected in zip(together, tap.factors(), strict=True):
        assert torch.equal(actual, expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_empty_bags_alone(approx):
    """Offsets, but no index: every output is zero, and so is A; the bags are examples."""
    module = nn.EmbeddingBag(3, 2, mode="mean").double()
    tap = tapped(module, approx=approx)
    y = module(torch.empty(0, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    batch_loss(y, 2).backward()
    A, G = tap.factors()
    assert torch.equal(A, torch.zeros(1, 3, dtype=torch.float64))
    assert G.abs().max() > 0


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(3, 2), (2, 0, 3)), (nn.Embedding(4, 3), (2, 0))],
    ids=str,
)
def test_examples_without_positions(module, shape, approx):
    """Sequences of no token: the means of no row count as zero."""
    module, x = copy.deepcopy(module).double(), _input(module, shape)
    tap = tapped(module, approx=approx)
    module(x).sum().backward()
    A, G = tap.factors()
    assert A.isfinite().all() and torch.equal(G, torch.zeros_like(G))
