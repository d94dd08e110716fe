"""Where a lowering is possible but slower than an einsum (benchmarks/layer.py), it is not used."""

import pytest

from tn_kfac.tensor_network.convolution import convolution
from tn_kfac.tensor_network.lower import lower


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


PER_EXAMPLE = {
    "an ordinary layer": (wide(56, 64, 3, padding=1), ("convolution",)),
    "channel groups": (wide(56, 64, 3, padding=1, groups=4), ()),
    "few positions": (wide(16, 64, 3, padding=1), ()),
    "few windows": (wide(32, 256, 3, stride=2, padding=1), ("strided view", "strided view")),
}


@pytest.mark.parametrize(("network", "lowerings"), PER_EXAMPLE.values(), ids=PER_EXAMPLE)
def test_per_example_gradients(network, lowerings):
    assert lower(network.vjp("weight", "v", keep=("n",))).lowerings == lowerings
