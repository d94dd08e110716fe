"""Where a lowering is possible but slower than an einsum (benchmarks/layer.py), it is not used."""

from fractions import Fraction

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tn_kfac.tensor_network.convolution import convolution
from tn_kfac.tensor_network.execute import execute
from tn_kfac.tensor_network.lower import lower
from tn_kfac.tensor_network.slicing import plan


def wide(size, channels, kernel, out=None, groups=1, **options):
    shape = (8, channels, size, size)
    out = channels if out is None else out
    return convolution(shape, kernel, out_channels=out, groups=groups, **options).network()


FORWARD = {
    "an ordinary layer": (wide(56, 64, 3, padding=1), True),
    "a small image of few channels": (wide(8, 64, 3, padding=1), True),
    "a small image of many channels": (wide(8, 512, 3, padding=1), False),
    "channels under kernels as large as the image": (wide(8, 64, 7, padding=3, groups=64), False),
    "channels under small kernels": (wide(8, 64, 3, padding=1, groups=64), True),
    "one window": (wide(5, 64, 5), False),
    "a matrix product": (wide(28, 64, 1), True),
    "a matrix product of many weights": (wide(14, 1024, 1), False),
    "a matrix product that widens": (wide(14, 64, 1, out=384), False),
    "a matrix product of few positions": (wide(5, 64, 1), False),
}


@pytest.mark.parametrize(("network", "is_call"), FORWARD.values(), ids=FORWARD)
def test_forward_pass(network, is_call):
    assert lower(network).lowerings == (("convolution",) if is_call else ())


@pytest.mark.parametrize(("size", "lowerings"), [(3, ("strided view",) * 2), (2, ())])
def test_windows_of_lines_with_fewer_pixels_than_offsets_are_no_view(size, lowerings):
    network = convolution((8, 64, size, size), 3, padding=1).rows().network
    assert lower(network).lowerings == lowerings


PER_EXAMPLE = {
    "an ordinary layer": (wide(56, 64, 3, padding=1), ("convolution",)),
    "channel groups": (wide(56, 64, 3, padding=1, groups=4), ()),
    "few positions": (wide(16, 64, 3, padding=1), ()),
    "few windows": (wide(32, 256, 3, stride=2, padding=1), ("strided view", "strided view")),
}


@pytest.mark.parametrize(("network", "lowerings"), PER_EXAMPLE.values(), ids=PER_EXAMPLE)
def test_per_example_gradients(network, lowerings):
    assert lower(network.vjp("weight", "v", keep=("n",))).lowerings == lowerings


ONE_WINDOW = convolution((64, 128, 5, 5), 5).rows()  # as AuxLogits.conv1 of InceptionV3
DIAGONALS = {
    "expand, one window": ("expand", ONE_WINDOW),
    "reduce, one window": ("reduce", ONE_WINDOW),
}


@pytest.mark.parametrize(("approx", "rows"), DIAGONALS.values(), ids=DIAGONALS)
def test_diagonal_of_one_window_is_a_mean_of_squares(approx, rows):
    """Nothing is left of the patterns, and the scale is no launch of its own."""
    network = rows.factor(approx, mean=True, tied=rows.feature).scaled(Fraction(1, 64))
    x = torch.randn(64, 128, 5, 5)
    computed = {}
    for lowered in (True, False):
        with Launches() as launches:
            result = execute(plan(network, True, lowered), {"x": x})
        torch.testing.assert_close(result, x.square().mean(0).flatten()[None])
        computed[lowered] = launches.names
    assert computed[True] == ["mul", "mean"]
    assert len(computed[True]) < len(computed[False])


class Launches(TorchDispatchMode):
    """The operations that compute something: those whose result is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "view" not in func.name():
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
