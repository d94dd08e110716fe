"""Tapping a model changes none of its numbers: outputs, gradients, second derivatives."""

import copy

import pytest
import torch
from reference.networks import DigitNet
from tapping import tapped
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from tn_kfac.curvature import ForwardScope, LayerTap
from tn_kfac.layers import Layer, layer_of


class OddInputs(nn.Module):
    """Linear layers on 1-d, 2-d and 4-d inputs, and convolutions without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", groups=1)
        self.grouped = nn.Conv2d(2, 4, 2, stride=2, groups=2, bias=False)
        self.four = nn.Linear(4, 3)
        self.one = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for image in x[:3]:
            features = self.grouped(self.conv(image).relu_())  # (4, 4, 4)
            four = self.four(features[None]).relu_()  # (1, 4, 4, 3)
            outputs.append(self.one(four.mean((0, 1, 2))))  # 1-d
        return torch.stack(outputs)


MODELS = {
    "digits": DigitNet,
    "in-place activations": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 4), nn.ReLU(True)
    ),
    "odd inputs": OddInputs,
    "in-place addition to the output": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 5), InPlaceResidual(), nn.Linear(5, 2)
    ),
    "transformer": lambda: nn.Sequential(
        nn.Flatten(1, 2), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    ),
    "views of an output": lambda: nn.Sequential(nn.Flatten(1, 2), nn.Linear(8, 6), Chunks()),
}


class InPlaceResidual(nn.Module):
    """Changes its input, the output of a layer, in place and by index."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1.0
        x[:, 0] *= 2.0
        return x


class Chunks(nn.Module):
    """Uses views of a layer's output, as a fused query-key-value projection does."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = x.chunk(3, dim=-1)
        return torch.softmax(query @ key.mT, -1) @ value


def _tap_all(model: nn.Module) -> list[LayerTap]:
    taps = [tapped(m) for m in model.modules() if isinstance(layer_of(m), Layer)]
    ForwardScope(taps).attach(model)
    return taps


def _pair(name: str) -> tuple[nn.Module, nn.Module, list[LayerTap]]:
    """A model, its tapped copy, and the taps."""
    plain = MODELS[name]().double()
    model = copy.deepcopy(plain)
    return plain, model, _tap_all(model)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bit_identical(digits, name):
    """Output and all gradients, those of the input included, and every layer is captured."""
    plain, model, taps = _pair(name)
    results = []
    for net in (plain, model):
        x = digits[0][:6].clone().requires_grad_()
        y = net(x)
        y.pow(2).sum().backward()
        results.append([y, x.grad, *(p.grad for p in net.parameters())])
    assert taps
    assert all(tap.factors() is not None for tap in taps)
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)


# torch has no second derivative of its fused attention.
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"transformer"}))
def test_gradient_penalty_is_bit_identical(digits, name):
    """create_graph: the gradients of a function of the input gradient are unchanged."""
    plain, model, _ = _pair(name)
    results = []
    for net in (plain, model):
        x = digits[0][:6].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
        gradient.pow(2).sum().backward()
        results.append([gradient, x.grad, *(p.grad for p in net.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert (expected is None) == (actual is None)
        assert expected is None or torch.equal(expected, actual)


def test_hessian_vector_product_is_bit_identical(digits):
    """Second derivatives with respect to the parameters pass through the taps."""
    plain, model, _ = _pair("digits")
    products = []
    for net in (plain, model):
        parameters = list(net.parameters())
        loss = net(digits[0][:6]).pow(3).sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        products.append(torch.autograd.grad(gradients, parameters, gradients))
    for expected, actual in zip(*products, strict=True):
        assert expected.norm() > 0
        assert torch.equal(expected, actual)


def test_output_hooks_of_others_still_fire(digits):
    """A forward hook that replaces the output works beside the tap, in either order."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    model[1].register_forward_hook(lambda module, args, y: 2 * y)
    tap = tapped(model[1])
    model[1].register_forward_hook(lambda module, args, y: y + 1)
    x = digits[0][:4]
    expected = 2 * nn.functional.linear(x.flatten(1), model[1].weight, model[1].bias) + 1
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert tap.factors() is not None


def test_gradient_of_a_view_is_not_copied():
    """A linear layer of tokens returns a view: its gradient reaches the layer as it came."""
    layer = nn.Linear(3, 4)
    tapped(layer, dtype=torch.float32)
    y = layer(torch.randn(2, 5, 3))
    assert not y._is_view()
    gradient, seen = torch.randn_like(y), []
    y.grad_fn.next_functions[0][0].register_prehook(lambda gradients: seen.extend(gradients))
    y.backward(gradient)
    assert [g.data_ptr() for g in seen] == [gradient.data_ptr()]


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
@pytest.mark.parametrize("everywhere", [False, True])
def test_outputs_that_others_hold(shape, everywhere):
    """What a hook before the tap keeps is changed in place, has its gradient, and is measured."""
    grads, factors = [], []
    for order in (None, "before", "after"):
        torch.manual_seed(0)
        layer, kept, x = nn.Linear(3, 4), [], torch.randn(shape)
        tap = tapped(layer, dtype=torch.float32) if order == "after" else None
        register = register_module_forward_hook if everywhere else layer.register_forward_hook
        handle = register(lambda module, args, output, kept=kept: kept.append(output))
        if order == "before":
            tap = tapped(layer, dtype=torch.float32)
        (layer(x).mul_(2.0).sin().sum() + kept[0].square().sum()).backward()
        handle.remove()
        grads.append(layer.weight.grad)
        if tap is not None and not (everywhere and order == "after"):
            factors.append(torch.cat([probe.grad.flatten() for probe in tap.probes]))
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    assert all(torch.equal(factor, factors[0]) for factor in factors)
