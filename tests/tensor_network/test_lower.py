"""Lowerings: kernels in place of nodes keep the value, and are found where they should be."""

from dataclasses import replace

import pytest
import torch
from expressions.strategies import cases, examples
from hypothesis import assume, given
from hypothesis import strategies as st

from tensor_network.oracle import evaluate
from tensor_network.strategies import bound, derived, forwards, networks, tensors_of
from tn_kfac.tensor_network.convolution import convolution
from tn_kfac.tensor_network.execute import execute
from tn_kfac.tensor_network.lower import PARTS, WHOLE, autocorrelation, lower
from tn_kfac.tensor_network.lower import convolution as convolutions
from tn_kfac.tensor_network.network import Network
from tn_kfac.tensor_network.pattern import Pattern
from tn_kfac.tensor_network.plan import plan_whole

LOWERINGS = [*WHOLE, *PARTS]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Lower wherever it is possible, whether it pays or not."""
    for module, gate in ((autocorrelation, "_pays"), (convolutions, "_fits")):
        monkeypatch.setattr(module, gate, lambda *_: True)


def lowered(network: Network, *names: str) -> tuple[Network, list[str]]:
    result = lower(network, names)
    return result.network, list(result.lowerings)


def check(network, tensors, *names):
    after, _ = lowered(network, *names)
    actual = execute(plan_whole.__wrapped__(after, False, False), tensors)
    torch.testing.assert_close(actual, evaluate(network, tensors), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LOWERINGS)
@examples(2)
@given(drawn=st.one_of(networks(), derived(), derived(dims=1)))
def test_lowering_keeps_the_value_of_any_network(name, drawn):
    check(drawn.network, drawn.tensors, name)


def factors(conv):
    rows = conv.rows()
    yield rows.factor("expand")
    yield rows.factor("expand", tied=("c",))
    yield rows.factor("expand", tied=rows.feature)
    yield rows.factor("reduce")
    yield rows.factor("reduce", tied=rows.feature)
    yield rows.total("expand")
    yield rows.network


def stride_one(dims):
    """Convolutions of stride 1, with any padding and dilation."""
    return bound(cases(dims, modes=["pixels", "same"]).map(_unstrided))


def _unstrided(case):
    return replace(case, stride=1)


@pytest.mark.parametrize("name", [*LOWERINGS, "all"])
@given(conv=st.one_of(forwards(dims=2), stride_one(st.sampled_from([1, 2, 3]))))
def test_lowering_keeps_the_value_of_factors(name, conv):
    names = LOWERINGS if name == "all" else [name]
    for network in factors(conv):
        check(network, tensors_of(network), *names)


def derivatives(conv):
    forward = conv.network()
    yield forward
    yield forward.vjp("x", "v")
    yield forward.vjp("weight", "v")
    yield forward.vjp("weight", "v", keep=("n",))
    yield forward.jvp("x", "t")


@given(forwards(dims=3))
def test_convolutions_and_their_derivatives_are_one_call(conv):
    for network in derivatives(conv):
        after, used = lowered(network, *LOWERINGS)
        assert used == ["convolution"]
        assert len(after.nodes) == 1
        check(network, tensors_of(network), *LOWERINGS)


def test_four_dimensions_are_left_to_einsum():
    """torch has no such convolution."""
    network = convolution((2, 2, 3, 3, 3, 3), 2, padding=1, groups=2, out_channels=4).network()
    assert "convolution" not in lowered(network, *LOWERINGS)[1]
    check(network, tensors_of(network), *LOWERINGS)


@given(forwards(dims=3))
def test_reduced_factor_is_window_sums_and_needs_no_pattern(conv):
    assume(all(axis.kernel_size <= axis.input_size for axis in conv.spatial))
    after, used = lowered(conv.rows().factor("reduce"), *LOWERINGS)
    counted = [node for node in after.nodes if isinstance(node, Pattern)]
    assert not [node for node in counted if node.kernel and node.input]
    assert set(used) <= {"window sum", "sum of squares"}


OVERLAPPING = {
    "a line": convolution((2, 2, 7), 3),
    "padded": convolution((2, 2, 7), 3, padding=((1, 4),)),
    "dilated": convolution((2, 4, 9), 3, padding=2, dilation=2, groups=2),
    "an image": convolution((2, 2, 6, 5), (3, 2), padding=(1, 0)),
    "a volume": convolution((2, 2, 4, 3, 4), 2, padding=1),
    "one sample": convolution((1, 1, 6, 5), 3, padding=1),
}


@pytest.mark.parametrize("conv", OVERLAPPING.values(), ids=OVERLAPPING)
def test_expanded_factor_of_stride_one_is_an_autocorrelation(conv):
    network = conv.rows().factor("expand")
    after, used = lowered(network, *LOWERINGS)
    assert used == ["autocorrelation"]
    assert len(after.nodes) == 1
    check(network, tensors_of(network), *LOWERINGS)


def test_other_strides_are_no_autocorrelation():
    network = convolution((2, 2, 9), 3, stride=2).rows().factor("expand")
    assert "autocorrelation" not in lowered(network, *LOWERINGS)[1]


@pytest.mark.parametrize("name", LOWERINGS)
def test_every_lowering_is_used_somewhere(name):
    conv = convolution((2, 4, 7), 3, padding=1, groups=2)
    strided = convolution((2, 4, 7), 3, stride=2, groups=2)
    used = [
        lowered(network, name)[1]
        for network in (*derivatives(conv), *factors(conv), *factors(strided))
    ]
    assert [name] in used or [name, name] in used
