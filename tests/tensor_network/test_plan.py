"""Plans: the order of contractions, what is shared, what they cost, and what they never do."""

import sys
import tracemalloc
from math import prod

import opt_einsum
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tensor_network.oracle import evaluate
from tensor_network.strategies import derived, forwards, integers, networks
from tn_kfac.tensor_network.convolution import convolution, transposed_convolution
from tn_kfac.tensor_network.execute import einsum_expression, execute
from tn_kfac.tensor_network.network import Network, operand
from tn_kfac.tensor_network.plan import plan_whole
from tn_kfac.tensor_network.simplify import simplify
from tn_kfac.tensor_network.slicing import plan

NAMES = ["forward", "input vjp", "weight vjp", "unfold", "reduce", "expand", "diagonal", "per"]
# Calls of functions, which a busy machine does not change (10,000 are about 3 ms), and bytes.
FEW, SOME, LARGE = 20_000, 100_000, 5_000_000


def network_of(conv, name) -> Network:
    rows = conv.rows()
    return {
        "forward": lambda: conv.network(),
        "input vjp": lambda: conv.network().vjp("x", "v"),
        "weight vjp": lambda: conv.network().vjp("weight", "v"),
        "per": lambda: conv.network().vjp("weight", "v", keep=("n",)),
        "unfold": lambda: rows.network,
        "reduce": lambda: rows.factor("reduce"),
        "expand": lambda: rows.factor("expand"),
        "diagonal": lambda: rows.factor("expand", tied=rows.feature),
    }[name]()


class NoTensors(TorchDispatchMode):
    """While this is entered, any operation on tensors is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"planning called {func}")


@pytest.mark.parametrize("name", NAMES)
@given(conv=forwards(dims=3))
def test_planning_touches_no_tensors(name, conv):
    with NoTensors(), pytest.raises(AssertionError, match="planning called"):
        torch.zeros(1)
    with NoTensors():
        plan.__wrapped__(network_of(conv, name))


def calls(work) -> int:
    """How many functions ``work`` calls, in Python and in C."""
    counted = 0

    def count(frame, event, arg):
        nonlocal counted
        counted += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return counted


def planned(build):
    """Derive, simplify, lower and plan as if for the first time."""
    for cache in (plan, plan_whole, simplify):
        cache.cache_clear()
    return plan(build())


@pytest.mark.parametrize("name", NAMES)
def test_planning_a_long_axis_is_cheap(name):
    """8000 pixels and 81 offsets are five integers: milliseconds and kilobytes."""

    def build():
        return network_of(convolution((1, 1, 8000), 81, padding=40), name)

    planned(build)
    assert calls(lambda: planned(build)) < FEW
    tracemalloc.start()
    planned(build)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < LARGE


HARD = {
    "no pixels left": transposed_convolution((2, 2, 1, 1, 1), 3, stride=2),
    "six dimensions": convolution((2, 2, *[3] * 6), 2, padding=1),
    "two by two": convolution((8, 4, 14, 14), 3, padding=1, groups=2),
    "three by three": convolution((8, 4, 7, 7, 7), 3, padding=1, stride=2),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("simplified", [True, False])
@pytest.mark.parametrize("conv", HARD.values(), ids=HARD)
def test_planning_any_network_is_cheap(conv, simplified, name):
    """No search over all orders: eight tensors that share no axis have two million of them."""
    network = network_of(conv, name)
    assert calls(lambda: plan.__wrapped__(network, simplified)) < SOME
    assert calls(lambda: plan_whole.__wrapped__(network, simplified, False)) < SOME


def test_a_search_over_all_orders_would_be_seen():
    """What the limits above forbid: eight small tensors, all orders of them tried."""
    axes = "abcdefgh"
    operands, sizes = [frozenset(axis) for axis in axes], dict.fromkeys(axes, 2)
    assert calls(lambda: opt_einsum.paths.optimal(operands, frozenset(axes), sizes)) > SOME


LONG = {
    "long kernel": convolution((1, 1, 8000), 81, padding=40),
    "raw audio": convolution((2, 1, 8000), 80, stride=4),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conv", LONG.values(), ids=LONG)
def test_no_pattern_of_a_long_axis_is_dense(conv, name):
    """Every tensor that is made is at most as large as the unfolded input or window counts.

    A dense pattern is thousands of times as large: gigabytes.
    """
    (axis,) = conv.spatial
    made = planned(lambda: network_of(conv, name))
    largest = max(prod(leaf.shape) for leaf in made.leaves)
    assert largest <= max(prod(conv.rows().network.shape), axis.kernel_size * axis.input_size)


REAL = [
    convolution((8, 6, 14, 14), 3, padding=1),
    convolution((4, 8, 16, 16), 3, stride=2, padding=1, groups=2),
    convolution((4, 3, 30), 5, dilation=2),
]


@pytest.mark.parametrize("lowered", [True, False])
@pytest.mark.parametrize("conv", REAL)
def test_half_of_a_gram_is_computed_once(conv, lowered):
    rows = conv.rows()
    half = plan(rows.network.sum(*rows.shared), True, lowered)
    gram = plan(rows.factor("reduce"), True, lowered)
    assert gram.steps[-1].inputs[0] == gram.steps[-1].inputs[1]
    assert len(gram.steps) == len(half.steps) + 1
    assert len(gram.leaves) == len(half.leaves)


@given(st.one_of(networks(), derived()), st.booleans())
def test_steps_use_live_values_and_free_each_once(drawn, simplified):
    made = plan_whole(drawn.network, simplified, False)
    alive = set(range(len(made.leaves)))
    for at, step in enumerate(made.steps):
        assert set(step.inputs) <= alive
        assert set(step.frees) <= set(step.inputs)
        alive -= set(step.frees)
        alive.add(len(made.leaves) + at)
    assert len(alive) == 1


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_costs_of_a_product_of_matrices(m, k, n):
    sizes = {"m": m, "k": k, "n": n}
    network = Network.build(
        [operand("a", "m", "k"), operand("b", "k", "n")], [("m",), ("n",)], sizes
    )
    made = plan_whole(network, False, False)
    assert made.flops == 2 * m * k * n
    assert made.traffic == m * k + k * n + m * n
    assert made.peak == 0  # nothing between operands and result


def test_peak_is_the_largest_value_between_operands_and_result():
    """A chain whose only sensible order makes (2, 50), then (2, 40), then the result."""
    nodes = [
        operand(name, *axes) for name, axes in zip("xyzw", ["ab", "bc", "cd", "de"], strict=True)
    ]
    sizes = {"a": 2, "b": 90, "c": 50, "d": 40, "e": 60}
    made = plan_whole(Network.build(nodes, [("a",), ("e",)], sizes), True, False)
    assert made.peak == 2 * 50
    assert made.flops == 2 * 2 * (90 * 50 + 50 * 40 + 40 * 60)


def test_more_axes_than_letters():
    """A chain of 60 matrices needs 61 axes; an equation has 52 letters."""
    matrices = {f"m{n}": integers(2, 2, seed=n) for n in range(60)}
    nodes = [operand(name, f"a{n}", f"a{n + 1}") for n, name in enumerate(matrices)]
    network = Network.build(nodes, [("a0",), ("a60",)], {f"a{n}": 2 for n in range(61)})
    expected = torch.eye(2, dtype=torch.float64)
    for matrix in matrices.values():
        expected = expected @ matrix
    torch.testing.assert_close(execute(plan(network), matrices), expected)
    with pytest.raises(ValueError, match=r"61 axes.*52 letters"):
        einsum_expression(network, matrices)


def test_the_first_52_letters_suffice_for_an_equation():
    matrices = {f"m{n}": integers(1, 1, seed=n) for n in range(51)}
    nodes = [operand(name, f"a{n}", f"a{n + 1}") for n, name in enumerate(matrices)]
    network = Network.build(nodes, [("a0",), ("a51",)], {f"a{n}": 1 for n in range(52)})
    equation, operands, shape = einsum_expression(network, matrices, False)
    expected = evaluate(simplify(network), matrices)
    assert torch.equal(torch.einsum(equation, *operands).reshape(shape), expected)
