"""What else torch's autograd offers works on a tapped model as on a bare one."""

import copy

import pytest
import torch
from tapping import tapped
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

from tn_kfac.curvature import LayerTap


def _pair() -> tuple[nn.Sequential, nn.Sequential, list[LayerTap], Tensor]:
    """A model, its tapped copy, its taps and an input."""
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = copy.deepcopy(plain)
    taps = [tapped(model[0]), tapped(model[2])]
    return plain, model, taps, torch.randn(5, 3, dtype=torch.float64)


def test_per_example_gradients_by_functional_transforms():
    """vmap(grad(functional_call)), torch's recipe for per-example gradients."""
    plain, model, _, x = _pair()
    results = []
    for net in (plain, model):
        parameters = {name: p.detach() for name, p in net.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor, net: nn.Module = net) -> Tensor:
            return functional_call(net, parameters, (x,)).pow(2).sum()

        results.append(vmap(grad(loss), (None, 0))(parameters, x))
    assert all(gradient.norm() > 0 for gradient in results[0].values())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_batched_gradients_of_the_input():
    """is_grads_batched, as torch.autograd.functional.jacobian(vectorize=True) uses it."""
    plain, model, _, x = _pair()
    jacobians = []
    for net in (plain, model):
        leaf = x.clone().requires_grad_()
        outputs, cotangents = net(leaf).sum(0), torch.eye(2, dtype=x.dtype)
        jacobians += torch.autograd.grad(outputs, leaf, cotangents, is_grads_batched=True)
    assert torch.equal(*jacobians)


def test_forward_mode():
    """Jacobian-vector products by dual numbers."""
    plain, model, _, x = _pair()
    tangents = []
    for net in (plain, model):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(net(forward_ad.make_dual(x, x + 1))).tangent)
    assert tangents[0].norm() > 0
    assert torch.equal(*tangents)


def test_gradients_of_the_input_do_not_pay_for_curvature(monkeypatch):
    """autograd.grad with respect to inputs needs no statistic, so none is formed."""
    _, model, _, x = _pair()
    calls = []
    measure = LayerTap.measure
    monkeypatch.setattr(LayerTap, "measure", lambda *args: calls.append(1) or measure(*args))
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(model(leaf).sum(), leaf)
    assert not calls
    model(leaf).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("accumulate", [False, True])
def test_backward_into_some_leaves_only(accumulate):
    """backward(inputs=...) fills these alone; statistics come with a full backward."""
    _, model, taps, x = _pair()
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward(inputs=[leaf])
    assert leaf.grad.norm() > 0
    assert all(tap.factors() is None for tap in taps)
    if accumulate:
        model(leaf).sum().backward()
        assert all(tap.factors() is not None for tap in taps)
