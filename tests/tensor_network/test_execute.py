"""Plans and equations evaluate to the network's value, however they were made."""

import gc
import weakref

import pytest
import torch
from expressions.strategies import examples
from hypothesis import given
from hypothesis import strategies as st

from tensor_network.oracle import evaluate
from tensor_network.strategies import derived, forwards, integers, networks, tensors_of
from tn_kfac.tensor_network import execute as module
from tn_kfac.tensor_network.execute import einsum_expression, execute
from tn_kfac.tensor_network.network import Delta, Network, operand
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis
from tn_kfac.tensor_network.simplify import simplify
from tn_kfac.tensor_network.slicing import plan

OPTIONS = st.sampled_from([(False, False), (True, False), (True, True)])  # simplified, lowered


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@examples(4)
@given(st.one_of(networks(), derived()), OPTIONS)
def test_plan_has_the_value_of_the_network(drawn, options):
    """Also the second time: nothing that was given or cached is written to."""
    expected = evaluate(drawn.network, drawn.tensors)
    close(execute(plan(drawn.network, *options), drawn.tensors), expected)
    close(execute(plan(drawn.network, *options), drawn.tensors), expected)
    assert torch.equal(evaluate(drawn.network, drawn.tensors), expected)


@examples(3)
@given(st.one_of(networks(), derived()), st.booleans())
def test_equation_has_the_value_of_the_network(drawn, simplified):
    equation, operands, shape = einsum_expression(drawn.network, drawn.tensors, simplified)
    assert shape == drawn.network.shape
    close(torch.einsum(equation, *operands).reshape(shape), evaluate(drawn.network, drawn.tensors))


@examples(3)
@given(st.one_of(networks(), derived()), OPTIONS, st.integers(1, 40))
def test_slices_have_the_value_of_the_network(drawn, options, limit):
    sliced = plan(drawn.network, *options, memory_limit=limit)
    close(execute(sliced, drawn.tensors), evaluate(drawn.network, drawn.tensors))


def of_sizes(nodes, output, **sizes):
    return Network.build(nodes, [(axis,) for axis in output], sizes)


# Two windows of one pixel, side by side: the identity.
IDENTITY = Pattern(SpatialAxis(2, 1), "k", "o", "i")
CONSTANT = {
    # The gradient of a sum over a is constant along a.
    "of a sum": of_sizes([operand("x", "a", "b")], "b", a=2, b=3).vjp("x", "v"),
    # Σ_k Σ_o Π[k, o, i]: how often a pixel is met, here once.
    "window counts": of_sizes([IDENTITY, operand("x", "b")], "bi", k=1, o=2, i=2, b=3),
    # δ(a, a) is a vector of ones.
    "delta": of_sizes([Delta("a", "a"), operand("x", "b")], "ab", a=2, b=3),
    "two deltas": of_sizes([Delta("a", "c"), Delta("c", "a"), operand("x", "b")], "ab",
                           a=2, b=3, c=2),
}  # fmt: skip


@pytest.mark.parametrize("network", CONSTANT.values(), ids=CONSTANT)
@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)])
def test_results_may_be_constant_along_an_axis(network, options):
    """An output axis that no node has (any more) is broadcast."""
    tensors = tensors_of(network)
    expected = evaluate(network, tensors)
    close(execute(plan(network, *options), tensors), expected)
    equation, operands, shape = einsum_expression(network, tensors, options[0])
    close(torch.einsum(equation, *operands).reshape(shape), expected)


@pytest.mark.parametrize("limit", [1, 3, 10**6])
@pytest.mark.parametrize("output", ["n", "k", "nk", "nok", ""])
def test_strided_views_are_not_cut(limit, output):
    """The batch may be sliced, but not the windows: their dimension has other pixels."""
    nodes = [Pattern(SpatialAxis(9, 2, stride=3), "k", "o", "i"), operand("x", "n", "i")]
    network = of_sizes(nodes, output, n=4, k=2, o=3, i=9)
    tensors = tensors_of(network)
    for same in (network, simplify(network)):
        sliced = plan(same, True, True, memory_limit=limit)
        close(execute(sliced, tensors), evaluate(network, tensors))


@given(forwards(dims=2), st.integers(1, 200))
def test_slicing_the_batch_keeps_the_limit(conv, limit):
    """Intermediates of a per-example quantity shrink with the batch, down to one example's."""
    network = conv.network().vjp("weight", "v", keep=("n",)).gram(("n",), keep=())
    limits = [plan(network, True, False, m).peak for m in (10**9, limit, 1)]
    assert limits == sorted(limits, reverse=True)
    assert limits[1] <= limit or limits[1] == limits[2]


def test_operands_share_memory_with_the_input():
    """Down-sampling is a view: nothing of x is copied before the contraction."""
    axis = SpatialAxis(12, 2, stride=4)
    nodes = [Pattern(axis, "k", "o", "i"), operand("x", "n", ("g", "c"), "i")]
    sizes = {"n": 2, "g": 2, "c": 3, "k": 2, "o": 3, "i": 12}
    network = Network.build(nodes, [("n",), ("g",), ("c",), ("k",), ("o",)], sizes)
    x = integers(2, 6, 12)
    _, operands, _ = einsum_expression(network, {"x": x})
    assert [t.untyped_storage().data_ptr() for t in operands] == [x.untyped_storage().data_ptr()]


def unfolding(pixels, simplify=False):
    """A network with a full pattern of a size that no other test uses."""
    nodes = [Pattern(SpatialAxis(pixels, 3), "k", "o", "i"), operand("x", "i")]
    sizes = {"k": 3, "o": pixels - 2, "i": pixels}
    return plan(Network.build(nodes, [("k",), ("o",)], sizes), True, False)


def test_patterns_built_in_inference_mode_serve_autograd():
    with torch.inference_mode():
        expected = execute(unfolding(71), {"x": torch.ones(71)})
    x = torch.ones(71, requires_grad=True)
    y = execute(unfolding(71), {"x": x})
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, expected.clone())
    assert torch.equal(gradient, torch.tensor([1.0, 2.0, *[3.0] * 67, 2.0, 1.0]))


TRANSFORMS = ["grad", "vmap", "functionalize", "fake", "meta device"]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_patterns_built_under_a_transform_serve_outside(transform):
    pixels = 73 + TRANSFORMS.index(transform)  # a pattern of its own: nothing is cached yet
    x = torch.arange(pixels, dtype=torch.float32)

    def function(x):
        return execute(unfolding(pixels), {"x": x})

    if transform == "grad":
        torch.func.grad(lambda x: function(x).sum())(x)
    elif transform == "vmap":
        torch.func.vmap(function)(x[None])
    elif transform == "functionalize":
        torch.func.functionalize(function)(x)
    elif transform == "fake":
        from torch.fx.experimental.proxy_tensor import make_fx

        make_fx(function, tracing_mode="fake")(x)
    else:
        with torch.device("meta"):
            function(x)
    assert torch.equal(function(x), x.unfold(0, 3, 1).T)


def test_operands_of_an_equation_belong_to_the_caller():
    """Writing to one must not change what later calls compute."""
    nodes = [Pattern(SpatialAxis(67, 3), "k", "o", "i"), operand("x", "i")]
    network = Network.build(nodes, [("k",), ("o",)], {"k": 3, "o": 65, "i": 67})
    x = torch.arange(67.0)
    expected = execute(plan(network, True, False), {"x": x})
    for tensor in einsum_expression(network, {"x": x.clone()})[1]:
        tensor.zero_()
    assert torch.equal(execute(plan(network, True, False), {"x": x}), expected)


def test_cached_patterns_are_bounded():
    """Old patterns are let go, so that ever new shapes do not fill the memory."""
    caches = [f for f in vars(module).values() if hasattr(f, "cache_parameters")]
    assert caches
    assert all(cache.cache_parameters()["maxsize"] is not None for cache in caches)


def test_values_are_freed_after_their_last_use(monkeypatch):
    """While a step runs, just the values that it or a later step needs are alive."""
    nodes = [operand(f"m{n}", f"a{n}", f"a{n + 1}") for n in range(6)]
    network = Network.build(nodes, [("a0",), ("a6",)], {f"a{n}": n % 3 + 1 for n in range(7)})
    tensors, made = tensors_of(network), plan(network)
    alive, counts, original = weakref.WeakSet(), [], module.contract

    def counted(equation, terms, dtype, scale):
        value = original(equation, terms, dtype, scale)
        alive.add(value)
        gc.collect()
        counts.append(len(alive))
        return value

    monkeypatch.setattr(module, "contract", counted)
    close(execute(made, tensors), torch.linalg.multi_dot([tensors[f"m{n}"] for n in range(6)]))
    used = [set(step.inputs) for step in made.steps]
    numbers = [len(made.leaves) + at for at in range(len(used))]
    needed = [
        sum(n == number or any(n in later for later in used[at:]) for n in numbers[: at + 1])
        for at, number in enumerate(numbers)
    ]
    assert counts == needed
