"""The operators on networks, by what they do to the value of any network.

Derivatives are judged by torch.autograd through the oracle.
"""

from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tensor_network.oracle import evaluate
from tensor_network.strategies import Drawn, derived, integers, networks
from tn_kfac.tensor_network.network import Network, Operand, operand

drawn_networks = st.one_of(networks(), derived(dims=1))


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


def split(drawn: Drawn) -> Network:
    """The network with one output dimension per axis."""
    return drawn.network.arranged(*((axis,) for axis in drawn.network.output_axes))


def differentiable(data, drawn: Drawn) -> Operand:
    """An operand that occurs once, each of its legs one axis that no other leg has."""
    counts = Counter(node.name for node in drawn.network.nodes if isinstance(node, Operand))
    unique = [
        node
        for node in drawn.network.nodes
        if isinstance(node, Operand)
        and counts[node.name] == 1
        and len(set(node.axes)) == len(node.axes)
        and not any(window for leg in node.legs for window in leg.windows)
    ]
    assume(unique)
    return data.draw(st.sampled_from(unique))


def subset(data, axes):
    return tuple(data.draw(st.lists(st.sampled_from(axes), unique=True))) if axes else ()


@given(drawn_networks, st.data())
def test_vjp_is_the_gradient(drawn, data):
    node, tensors = differentiable(data, drawn), dict(drawn.tensors)
    at = tensors[node.name] = tensors[node.name].clone().requires_grad_()
    y = evaluate(drawn.network, tensors)
    v = integers(*y.shape, seed=7)
    (gradient,) = torch.autograd.grad(y, at, v)
    equal(evaluate(drawn.network.vjp(node.name, "new"), drawn.tensors | {"new": v}), gradient)


@given(drawn_networks, st.data())
def test_vjp_with_kept_axes_is_the_gradient_of_each_slice(drawn, data):
    node, tensors = differentiable(data, drawn), dict(drawn.tensors)
    network = split(drawn)
    kept = subset(data, [axis for axis in network.output_axes if axis not in node.axes])
    at = tensors[node.name] = tensors[node.name].clone().requires_grad_()
    y = evaluate(network, tensors)
    v = integers(*y.shape, seed=7)
    dims = [network.output_axes.index(axis) for axis in kept]
    actual = evaluate(network.vjp(node.name, "new", keep=kept), drawn.tensors | {"new": v})
    slices = (y * v).movedim(dims, list(range(len(dims))))
    for place in product(*(range(network.size[axis]) for axis in kept)):
        (gradient,) = torch.autograd.grad(slices[place].sum(), at, retain_graph=True)
        equal(actual[place], gradient)


@given(drawn_networks, st.data())
def test_jvp_is_the_value_at_the_tangent(drawn, data):
    node = differentiable(data, drawn)
    tangent = integers(*drawn.tensors[node.name].shape, seed=8)
    actual = evaluate(drawn.network.jvp(node.name, "new"), drawn.tensors | {"new": tangent})
    equal(actual, evaluate(drawn.network, drawn.tensors | {node.name: tangent}))


@given(drawn_networks, st.data())
def test_jacobian_is_that_of_autograd_without_its_identity_factors(drawn, data):
    node, network = differentiable(data, drawn), split(drawn)
    others = {axis for other in network.nodes if other is not node for axis in other.axes}
    size = network.size

    def forward(x):
        return evaluate(network, drawn.tensors | {node.name: x})

    full = torch.autograd.functional.jacobian(forward, drawn.tensors[node.name])
    out, legs = network.output_axes, node.axes
    full = full.reshape([size[axis] for axis in (*out, *legs)])
    label = {axis: number for number, axis in enumerate(size)}
    once = list(dict.fromkeys((*out, *legs)))  # the diagonal in axes that both have
    diagonal = torch.einsum(full, [label[a] for a in (*out, *legs)], [label[a] for a in once])
    for axis in reversed(once):  # constant along axes that nothing else has
        if axis not in others:
            diagonal = diagonal.select(once.index(axis), 0)
            once.remove(axis)
    jacobian = network.jacobian(node.name)
    assert sorted(jacobian.output_axes) == sorted(once)
    actual = evaluate(jacobian.arranged(*((axis,) for axis in once)), drawn.tensors)
    equal(actual, diagonal)


@given(drawn_networks, st.data())
def test_sum_is_the_sum(drawn, data):
    network = split(drawn)
    axes = subset(data, network.output_axes)
    dims = [network.output_axes.index(axis) for axis in axes]
    expected = evaluate(network, drawn.tensors)
    actual = evaluate(network.sum(*axes), drawn.tensors)
    equal(actual, expected.sum(dims) if dims else expected)


@given(drawn_networks, st.data())
def test_tie_is_the_diagonal(drawn, data):
    network = split(drawn)
    axes, size = network.output_axes, network.size
    pairs = [(a, b) for a in axes for b in axes if a != b and size[a] == size[b]]
    assume(pairs)
    axis, other = data.draw(st.sampled_from(pairs))
    diagonal = evaluate(network, drawn.tensors).diagonal(0, axes.index(axis), axes.index(other))
    rest = [a for a in axes if a not in (axis, other)]
    tied = network.tie(axis, other)
    assert set(tied.output_axes) == {*rest, axis}
    equal(evaluate(tied.arranged(*((a,) for a in (*rest, axis))), drawn.tensors), diagonal)


@given(drawn_networks, st.data())
def test_untied_writes_the_diagonal_out(drawn, data):
    network = split(drawn)
    assume(network.output_axes)
    axis = data.draw(st.sampled_from(network.output_axes))
    value = evaluate(network, drawn.tensors)
    at = network.output_axes.index(axis)
    expected = torch.diag_embed(value.movedim(at, -1), dim1=at, dim2=-1)
    equal(evaluate(network.untied(axis, "new"), drawn.tensors), expected)


def check_gram(drawn, data):
    network = split(drawn)
    rows = subset(data, network.output_axes)
    shared = [axis for axis in network.output_axes if axis not in rows]
    keep = subset(data, shared)
    order = [*keep, *(axis for axis in shared if axis not in keep), *rows]
    value = evaluate(network.arranged(*((axis,) for axis in order)), drawn.tensors)
    value = value.flatten(len(shared)) if rows else value[..., None]
    value = value.reshape(*value.shape[: len(keep)], -1, value.shape[-1])
    equal(evaluate(network.gram(rows, keep), drawn.tensors), value.mT @ value)


@given(drawn_networks, st.data())
def test_gram_is_the_product_with_itself(drawn, data):
    assume(not any("'" in axis for axis, _ in drawn.network.sizes))
    check_gram(drawn, data)


@given(drawn_networks, st.data())
def test_gram_of_a_gram_primes_other_axes(drawn, data):
    gram = drawn.network.gram(subset(data, drawn.network.output_axes))
    check_gram(Drawn(gram, drawn.tensors), data)


@given(drawn_networks, st.data())
def test_stacked_is_the_value_of_each(drawn, data):
    node = differentiable(data, drawn)
    many = integers(3, *drawn.tensors[node.name].shape, seed=9)
    actual = evaluate(drawn.network.stacked(node.name, "s", 3), drawn.tensors | {node.name: many})
    each = [evaluate(drawn.network, drawn.tensors | {node.name: one}) for one in many]
    equal(actual, torch.stack(each))


@given(drawn_networks, st.fractions(-3, 3, max_denominator=4))
def test_scaled_is_the_multiple(drawn, factor):
    expected = float(factor) * evaluate(drawn.network, drawn.tensors)
    torch.testing.assert_close(evaluate(drawn.network.scaled(factor), drawn.tensors), expected)


@given(drawn_networks)
def test_networks_are_values(drawn):
    """Equal networks hash alike, however they were made; renaming there and back is nothing."""
    there = {axis: f"{axis}?" for axis, _ in drawn.network.sizes}
    back = {new: old for old, new in there.items()}
    again = drawn.network.renamed(there).renamed(back)
    assert again == drawn.network
    assert hash(again) == hash(drawn.network)
    assert drawn.network.shape == evaluate(drawn.network, drawn.tensors).shape
    if drawn.network.sizes:
        assert drawn.network.renamed(there) != drawn.network


def test_a_network_is_frozen():
    network = Network.build([operand("x", "a")], [("a",)], {"a": 2})
    with pytest.raises(AttributeError):
        network.scale = Fraction(2)  # type: ignore[misc]
