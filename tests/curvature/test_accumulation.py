"""Statistics add up over backward passes, and over the calls of a layer in one pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import kfac
from reference.cases import (
    APPROXIMATIONS,
    LOSS_AVERAGES,
    batch_loss,
    example_loss,
    layer_cases,
)
from tapping import tapped
from torch import Tensor, nn

from tn_kfac.curvature import ForwardScope

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
each_approx = pytest.mark.parametrize("approx", APPROXIMATIONS)


@given(
    case=layer_cases().filter(lambda case: case.batched and len(case.x) > 1),
    approx=st.sampled_from(APPROXIMATIONS),
    loss_average=st.sampled_from(LOSS_AVERAGES),
    name=st.sampled_from(["dense", "diagonal"]),
    cut=st.integers(1, 3),
    together=st.booleans(),
)
def test_micro_batches_of_any_size_equal_one_batch(case, approx, loss_average, name, cut, together):
    """Loss terms divided by their number over all micro-batches, in one or two backwards."""
    cut = min(cut, len(case.x) - 1)
    options = {"approx": approx, "loss_average": loss_average, "structures": (name, name)}
    tap = tapped(case.module, **options)
    y = case.outputs()
    terms = kfac.loss_terms(loss_average, len(y), case.positions(y))
    batch_loss(y, terms).backward()
    expected = tap.factors()

    tap.clear()
    first = batch_loss(case.outputs(case.x[:cut]), terms)
    second = batch_loss(case.outputs(case.x[cut:]), terms, first=cut)
    if together:
        (first + second).backward()
    else:
        first.backward()
        second.backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)


class Twice(nn.Module):
    """One layer, or two with the same parameters, called one after the other."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3) if tied else self.first
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.double()

    @property
    def modules_used(self) -> list[nn.Module]:
        return list(dict.fromkeys([self.first, self.second]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def _expected_of_twice(model: Twice, x: Tensor, approx: str) -> tuple[Tensor, Tensor]:
    """Factors of both calls together: rows of either are rows, samples count once."""
    first = model.first(x)
    hidden = torch.tanh(first)
    second = model.second(hidden)
    h = torch.autograd.grad(batch_loss(second), [first, second])
    a = [x, hidden.detach()]
    if approx == "reduce":
        a = [rows.mean(1, keepdim=True) for rows in a]
        h = [rows.sum(1, keepdim=True) for rows in h]
    a, h = (torch.cat(list(rows), dim=1)[:, :, None] for rows in (a, h))
    return kfac.factors(a, h, "expand", terms=len(x))


@each_approx
@pytest.mark.parametrize("tied", [False, True], ids=["one module", "tied modules"])
def test_layer_called_twice_in_a_forward_pass(tied, approx):
    """A averages the rows of both calls; the loss has as many terms as samples, not calls."""
    model = Twice(tied)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = _expected_of_twice(model, x, approx)
    tap = tapped(*model.modules_used, approx=approx)
    ForwardScope([tap]).attach(model)
    batch_loss(model(x), len(x)).backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)


@each_approx
@pytest.mark.parametrize("tied", [False, True], ids=["one module", "tied modules"])
def test_micro_batches_of_a_layer_called_twice(tied, approx):
    """Two forward passes, then one backward: each sample counts once in either."""
    model = Twice(tied)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = _expected_of_twice(model, x, approx)
    tap = tapped(*model.modules_used, approx=approx)
    ForwardScope([tap]).attach(model)
    first = batch_loss(model(x[:2]), len(x))
    second = batch_loss(model(x[2:]), len(x), first=2)
    (first + second).backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)


def test_repeated_backward_adds_as_often():
    """retain_graph: twice the rows and samples of the same pass leave A, and double sums."""
    module = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    A, G = kfac.layer_factors(module, list(x), example_loss, "expand", None)
    tap = tapped(module, loss_average=None)
    loss = batch_loss(module(x))
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(tap.factors(), (A, 2 * G), **TIGHT)


def test_clear_forgets():
    """After `clear` there are no factors, and a new pass starts from nothing."""
    module = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = kfac.layer_factors(module, list(x), example_loss, "expand", "batch")
    tap = tapped(module)
    batch_loss(3 * module(x[:2])).backward()
    tap.clear()
    assert tap.factors() is None
    batch_loss(module(x), 4).backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)


def _no_grad(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def _inference_mode(module: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        module(x)


def _without_backward(module: nn.Module, x: Tensor) -> None:
    module(x)


def _gradient_of_input_only(module: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(batch_loss(module(x)), x)


def _gradient_of_parameters_returned(module: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(batch_loss(module(x)), list(module.parameters()))


@pytest.mark.parametrize(
    "use",
    [
        _no_grad,
        _inference_mode,
        _without_backward,
        _gradient_of_input_only,
        _gradient_of_parameters_returned,
    ],
)
def test_passes_without_backward_into_parameters_add_nothing(use):
    """Evaluation, and autograd.grad, which fills no `.grad`, leave the statistics alone."""
    module = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = kfac.layer_factors(module, list(x), example_loss, "expand", "batch")
    tap = tapped(module)
    use(module, x)
    assert tap.factors() is None
    batch_loss(module(x), 4).backward()
    use(module, 2 * x)
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)


def test_disabled_tap_adds_nothing():
    """Steps that do not update the curvature do not pay for it."""
    module = nn.Linear(3, 2).double()
    tap = tapped(module)
    tap.enabled = False
    batch_loss(module(torch.randn(4, 3, dtype=torch.float64))).backward()
    assert tap.factors() is None
    assert module.weight.grad.norm() > 0


def test_eval_mode_is_captured_alike():
    """Capture follows gradients, not `training`: fine-tuning with frozen statistics works."""
    module = nn.Linear(3, 2).double().eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = kfac.layer_factors(module, list(x), example_loss, "expand", "batch")
    tap = tapped(module)
    batch_loss(module(x), 4).backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)


@each_approx
@pytest.mark.parametrize("name", ["dense", "diagonal"])
def test_empty_batch_adds_nothing(approx, name):
    """An expert that no token was sent to: no rows, no samples, and no NaN."""
    module = nn.Linear(3, 2).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    tap = tapped(module, approx=approx, structures=(name, name))
    batch_loss(module(x), 4).backward()
    expected = tap.factors()
    module(x[:0]).sum().backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)
    assert expected[1].abs().max() > 0
