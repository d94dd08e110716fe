"""Capture keeps no activation that the layer does not keep itself, nor keeps it longer."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tapping import tapped
from torch import Tensor, nn

LAYERS = {
    "linear": lambda: (nn.Linear(3, 4), torch.randn(5, 2, 3)),
    "convolution": lambda: (nn.Conv2d(2, 4, 3, groups=2, padding=1), torch.randn(5, 2, 6, 6)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@contextmanager
def _no_cycle_collector() -> Iterator[None]:
    """What is freed here is freed by reference counts alone, so at once."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@each_layer
@pytest.mark.parametrize("use_tap", [False, True])
def test_input_dies_with_the_backward_pass(name, use_tap):
    """The graph may live on: the saved input is gone, as it is without a tap."""
    with _no_cycle_collector():
        module, x = LAYERS[name]()
        tap = tapped(module, dtype=torch.float32) if use_tap else None
        alive = weakref.ref(x)
        loss = module(x).sum()
        del x
        assert alive() is not None, "the layer needs its input in the backward pass"
        loss.backward()
        assert alive() is None
        assert loss.grad_fn is not None
        assert tap is None or tap.factors() is not None


@each_layer
@pytest.mark.parametrize("use_tap", [False, True])
def test_input_dies_with_the_graph(name, use_tap):
    """Without a backward pass the input lives as long as the output."""
    with _no_cycle_collector():
        module, x = LAYERS[name]()
        if use_tap:
            tapped(module, dtype=torch.float32)
        alive = weakref.ref(x)
        y = module(x)
        del x
        assert alive() is not None
        del y
        assert alive() is None


@each_layer
def test_module_and_tap_die_without_the_cycle_collector(name):
    """A tap makes no reference cycle through the graph of a pass."""
    with _no_cycle_collector():
        module, x = LAYERS[name]()
        tapped(module, dtype=torch.float32)
        y = module(x)
        y.sum().backward()
        alive = weakref.ref(module)
        del module, x, y
        assert alive() is None


def _saved_storages(model: nn.Module, x: Tensor) -> list[int]:
    """Sizes in bytes of the distinct storages that a forward pass saves for backward."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sorted(tensor.untyped_storage().nbytes() for tensor in saved.values())


NETWORKS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    ),
    "tokens": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(36, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("frozen_first_weight", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_pass_saves_the_same_storages(name, frozen_first_weight):
    """Not one storage more than without taps; a frozen weight needs no input."""
    model = NETWORKS[name]()
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    layers[1].weight.requires_grad_(not frozen_first_weight)
    x = torch.randn(5, 2, 6, 6)
    expected = _saved_storages(model, x)
    taps = [tapped(layer, dtype=torch.float32) for layer in layers]
    assert _saved_storages(model, x) == expected
    model(x).sum().backward()
    assert all(tap.factors() is not None for tap in taps)


@each_layer
def test_output_is_not_copied(name):
    """The tapped output is the very memory that the layer wrote."""
    module, x = LAYERS[name]()
    raw: list[int] = []
    module.register_forward_hook(lambda module, args, y: raw.append(y.data_ptr()))
    tap = tapped(module, dtype=torch.float32)
    y = module(x)
    y.sum().backward()
    assert [y.data_ptr()] == raw
    assert tap.factors() is not None
