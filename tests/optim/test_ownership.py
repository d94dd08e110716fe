"""What an optimizer leaves behind: nothing of discarded batches, no hooks, no broken copies."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from tn_kfac import SINGD


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("discard", [nn.Module.zero_grad, None])
@pytest.mark.parametrize("factor", [100.0, float("nan")])
def test_discarded_gradients_take_their_curvature_along(factor, discard):
    """A batch whose gradients were dropped, by whatever means, is as if it had not been."""
    clean, dropped = _model(), _model()
    dropped.load_state_dict(clean.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizers = [SINGD(m, lr=0.1, T=1) for m in (clean, dropped)]
    for _ in range(3):
        dropped(factor * x).square().mean().backward()
        if discard is None:
            for parameter in dropped.parameters():
                parameter.grad = None
        else:
            discard(dropped)
        for model, optimizer in zip((clean, dropped), optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            model.zero_grad()
    for expected, actual in zip(clean.parameters(), dropped.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_hooks_go_with_the_optimizer():
    model = _model()
    before = _hooks(model)
    for _ in range(3):
        optimizer = SINGD(model)
        assert _hooks(model) > before
        del optimizer
        gc.collect()
        assert _hooks(model) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_optimizers_are_not_copied(duplicate):
    with pytest.raises(TypeError, match="load state_dict"):
        duplicate(SINGD(_model()))


def test_lazy_layers_want_an_input_first():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"lazy layer '0'.*forward pass"):
        SINGD(model)
    assert _hooks(model) == len(model[0]._forward_pre_hooks)
    model(torch.randn(2, 5))
    assert [group["rule"] for group in SINGD(model).param_groups] == ["singd"]


def test_complex_weights_follow_the_fallback():
    model = nn.Linear(3, 2, dtype=torch.complex128)
    with pytest.warns(UserWarning, match="without Kronecker factors: .* has complex parameters"):
        optimizer = SINGD(model, lr=0.1, momentum=0.0, fallback="sgd")
    before = model.weight.detach().clone()
    model(torch.randn(4, 3, dtype=torch.complex128)).abs().square().mean().backward()
    optimizer.step()
    assert [group["rule"] for group in optimizer.param_groups] == ["sgd"]
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * model.weight.grad)


@pytest.mark.parametrize("state", [{}, None, {"state": {}}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="state_dict must hold"):
        SINGD(_model()).load_state_dict(state)
