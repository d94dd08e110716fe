"""A forward pass of the model counts each sample once; its parts called alone, each call."""

import pytest
import torch
from reference import kfac
from reference.cases import batch_loss, example_loss
from tapping import tapped
from torch import Tensor, nn

from tn_kfac.curvature import ForwardScope

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


class Reusing(nn.Module):
    """Calls its layer several times, and may fail in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()
        self.fail = False

    def forward(self, x: Tensor, calls: int = 2) -> Tensor:
        for _ in range(calls):
            x = self.layer(x)
            if self.fail:
                raise ArithmeticError("in the middle of a forward pass")
        return x


def _gradient_sum(model: Reusing, x: Tensor, calls: int) -> Tensor:
    """Σ g gᵀ over samples and calls, for the gradients of Σ_n L_n."""
    outputs = []
    for _ in range(calls):
        x = model.layer(x)
        outputs.append(x)
    h = torch.stack(torch.autograd.grad(batch_loss(x), outputs), dim=1)[:, :, None]
    return kfac.factors(h, h, "expand", terms=1)[1]


def _scoped(model: Reusing):
    tap = tapped(model.layer)
    scope = ForwardScope([tap])
    return tap, scope.attach(model)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_samples_count_once_in_a_forward_pass(calls):
    """G = N Σ g gᵀ for N samples, however often the layer is called."""
    model = Reusing()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = 4 * _gradient_sum(model, x, calls)
    tap, _ = _scoped(model)
    batch_loss(model(x, calls)).backward()
    torch.testing.assert_close(tap.factors().G, expected, **TIGHT)


def test_parts_called_alone_count_every_call():
    """Outside of a forward pass two calls see two batches of N samples."""
    model = Reusing()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = 8 * _gradient_sum(model, x, 2)
    tap, _ = _scoped(model)
    batch_loss(model.layer(model.layer(x))).backward()
    torch.testing.assert_close(tap.factors().G, expected, **TIGHT)


@pytest.mark.parametrize("alone", [False, True], ids=["then the model", "then a part"])
def test_failed_forward_pass_leaves_no_trace(alone):
    """After an exception the next pass counts as if there had been none."""
    model = Reusing()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = (8 if alone else 4) * _gradient_sum(model, x, 2)
    tap, _ = _scoped(model)
    model.fail = True
    with pytest.raises(ArithmeticError, match="in the middle"):
        model(x)
    model.fail = False
    output = model.layer(model.layer(x)) if alone else model(x)
    batch_loss(output).backward()
    torch.testing.assert_close(tap.factors().G, expected, **TIGHT)


def test_parts_called_before_and_after_the_model():
    """A warm-up call of a layer does not eat the samples of the next forward pass."""
    model = Reusing()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = 4 * _gradient_sum(model, x, 2)
    tap, _ = _scoped(model)
    model.layer(x)
    output = model(x)
    model.layer(x)
    batch_loss(output).backward()
    torch.testing.assert_close(tap.factors().G, expected, **TIGHT)


def test_evaluation_inside_training_changes_nothing():
    """A no_grad pass between the forward and the backward pass of training."""
    model = Reusing()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = 4 * _gradient_sum(model, x, 2)
    tap, _ = _scoped(model)
    output = model(x)
    with torch.no_grad():
        model(2 * x)
    batch_loss(output).backward()
    torch.testing.assert_close(tap.factors().G, expected, **TIGHT)


def test_removed_handles_leave_a_bare_model():
    """The handles that `attach` returns remove everything that it installed."""
    model = Reusing()
    _, handles = _scoped(model)
    assert model._forward_hooks and model._forward_pre_hooks
    for handle in handles:
        handle.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


class Siamese(nn.Module):
    """One call of the layer makes a target, from which no gradient comes back."""

    def __init__(self, target_first: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()
        self.target_first = target_first

    def forward(self, x: Tensor) -> Tensor:
        if self.target_first:
            target = self.layer(x + 1).detach()
            return self.layer(x) - target
        output = self.layer(x)
        return output - self.layer(x + 1).detach()


@pytest.mark.parametrize("target_first", [False, True])
def test_call_without_gradient_does_not_take_the_samples_along(target_first):
    """The samples count with whichever call the gradient comes back to."""
    model = Siamese(target_first)
    x = torch.randn(4, 3, dtype=torch.float64)
    target = model.layer(x + 1).detach()
    expected = kfac.layer_factors(
        model.layer, list(x), lambda y, n: example_loss(y - target[n], n), "expand", "batch"
    )
    tap = tapped(model.layer)
    ForwardScope([tap]).attach(model)
    batch_loss(model(x), 4).backward()
    torch.testing.assert_close(tap.factors(), expected, **TIGHT)
