"""What simplification promises of the networks that training contracts."""

import pytest
from expressions import strategies as convolutions
from expressions.strategies import cases
from hypothesis import given
from hypothesis import strategies as st

from tensor_network.strategies import bound, forwards
from tn_kfac.tensor_network.network import Network, Operand
from tn_kfac.tensor_network.pattern import Pattern
from tn_kfac.tensor_network.simplify import simplify


def patterns(network: Network) -> list[Pattern]:
    return [node for node in network.nodes if isinstance(node, Pattern)]


def operands(network: Network, name: str) -> list[Operand]:
    return [n for n in network.nodes if isinstance(n, Operand) and n.name == name]


@given(forwards(dims=3))
def test_reduced_factor_has_window_counts_only(conv):
    """No pattern keeps its output leg: KFAC-reduce never unfolds."""
    network = conv.rows().factor("reduce")
    assert len(patterns(network)) == 2 * len(conv.spatial)
    assert all(pattern.output is None for pattern in patterns(simplify(network)))


@given(forwards(dims=3))
def test_diagonal_of_expanded_factor_is_one_pattern_with_x_twice(conv):
    """The window sum of x²: one window count per spatial axis, and x times x."""
    rows = conv.rows()
    network = simplify(rows.factor("expand", tied=rows.feature))
    first, second = operands(network, "x")
    assert first == second
    assert len(patterns(network)) <= len(conv.spatial)
    assert all(pattern.output is None for pattern in patterns(network))


@st.composite
def of_kind(draw, kind, dims=3):
    """A convolution of which each axis is of one kind."""
    number = draw(st.integers(1, dims))
    return draw(bound(cases(st.just(number), axis=kind, modes=["pixels"])))


@given(of_kind(convolutions.dense))
def test_dense_patterns_disappear(conv):
    rows = conv.rows()
    for network in (
        conv.network(),
        rows.network,
        rows.factor("reduce"),
        rows.factor("expand"),
        rows.factor("expand", tied=rows.feature),
        conv.network().vjp("weight", "v"),
    ):
        assert not patterns(simplify(network))


@given(of_kind(convolutions.down_sampling))
def test_down_sampling_patterns_become_slices(conv):
    for network in (conv.network(), conv.rows().network, conv.network().vjp("weight", "v")):
        simplified = simplify(network)
        assert not patterns(simplified)
        (x,) = operands(simplified, "x")
        views = [window for leg in x.legs for window in leg.windows if window is not None]
        assert len(views) >= sum(a.input_size > a.kernel_size * a.output_size for a in conv.spatial)


@given(forwards(dims=3))
def test_other_patterns_stay(conv):
    """Windows that overlap or reach into padding cannot be undone in a forward pass."""
    needed = [
        axis
        for axis in conv.spatial
        if axis.kernel_size > 1
        and axis.output_size > 1
        and axis.input_size > 1
        and (axis.stride < axis.reach or axis.padding[0])
    ]
    assert len(patterns(simplify(conv.network()))) >= len(needed)


@pytest.mark.parametrize("diagonal", [False, True])
@given(forwards(dims=2), st.sampled_from(["expand", "reduce"]))
def test_no_axis_of_size_one_stays(diagonal, conv, approx):
    rows = conv.rows()
    network = simplify(rows.factor(approx, tied=rows.feature if diagonal else ()))
    assert all(size > 1 for _, size in network.sizes)
