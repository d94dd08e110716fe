"""Activations that are recomputed in the backward pass are counted once."""

import pytest
import torch
from reference.cases import batch_loss
from tapping import tapped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tn_kfac.curvature import ForwardScope, LayerTap

TIGHT = {"rtol": 1e-12, "atol": 1e-14}
each_kind = pytest.mark.parametrize("reentrant", [False, True], ids=["default", "reentrant"])


class Segments(nn.Module):
    """Two segments that are checkpointed if `reentrant` is not None; a layer outside."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.before = nn.Linear(3, 4)
        self.inside = nn.Linear(4, 4)
        self.after = nn.Linear(4, 2)
        self.calls = calls
        self.reentrant: bool | None = None
        self.double()

    def _segment(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = nn.functional.leaky_relu_(self.inside(x), 0.3)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.before(x))
        for _ in range(2 if self.calls == 1 else 1):
            if self.reentrant is None:
                x = self._segment(x)
            else:
                x = checkpoint(self._segment, x, use_reentrant=self.reentrant)
        return self.after(x)


def _prepared(calls: int) -> tuple[Segments, list[LayerTap], list]:
    """A tapped model, and the factors that it gives without checkpointing."""
    model = Segments(calls)
    taps = [tapped(layer) for layer in (model.before, model.inside, model.after)]
    ForwardScope(taps).attach(model)
    factors = _factors(model, taps)
    gradients = [p.grad.clone() for p in model.parameters()]
    assert all(tensor.norm() > 1e-6 for pair in factors for tensor in pair)
    return model, taps, [factors, gradients]


def _factors(model: Segments, taps: list[LayerTap]) -> list:
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
    model.zero_grad()
    for tap in taps:
        tap.clear()
    batch_loss(model(x), 5).backward()
    return [tap.factors() for tap in taps]


@each_kind
def test_checkpointed_segments_equal_plain_ones(reentrant):
    """Two segments that call one layer: gradients and factors are those without."""
    model, taps, (factors, gradients) = _prepared(calls=1)
    model.reentrant = reentrant
    torch.testing.assert_close(_factors(model, taps), factors, **TIGHT)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, **TIGHT)


@each_kind
def test_layer_called_twice_in_a_checkpointed_segment(reentrant):
    """Recomputing a segment that calls a layer twice counts each sample once."""
    model, taps, (factors, _) = _prepared(calls=2)
    model.reentrant = reentrant
    torch.testing.assert_close(_factors(model, taps), factors, **TIGHT)


@each_kind
def test_next_pass_is_not_disturbed(reentrant):
    """Calls made while recomputing do not count as calls of the next forward pass."""
    model, taps, (factors, _) = _prepared(calls=2)
    model.reentrant = reentrant
    _factors(model, taps)
    model.reentrant = None
    torch.testing.assert_close(_factors(model, taps), factors, **TIGHT)
