"""The second call with the same shapes does no symbolic work: it looks a plan up."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expressions import reference
from expressions.calls import CALLS, cases_of
from expressions.strategies import Case, examples
from tn_kfac import expressions
from tn_kfac.tensor_network.network import Network

RANDOMIZED = ["randomized_input_vjp", "randomized_weight_vjp"]


def caches():
    """Every cache of the symbolic core, by name."""
    return {
        f"{module}.{name}": value
        for module, contents in list(sys.modules.items())
        if module.startswith("tn_kfac.tensor_network")
        for name, value in vars(contents).items()
        if hasattr(value, "cache_info")
    }


def misses():
    return {name: cache.cache_info().misses for name, cache in caches().items()}


def ways(name, tensors, hyper):
    """The two ways to evaluate an operation."""
    operation = getattr(expressions, name)
    values = tensors.values()
    return [
        lambda: operation(*values, **hyper),
        lambda: operation.einsum_expression(*values, **hyper),
    ]


def test_the_core_has_caches():
    assert any(name.endswith(".simplify") for name in caches())
    assert any(name.endswith(".plan") for name in caches())


@pytest.mark.parametrize("name", CALLS)
@examples(0.2)
@given(data=st.data())
def test_second_call_misses_no_cache_and_builds_no_network(name, data):
    case = data.draw(cases_of(name))
    for way in ways(name, *CALLS[name](case)):
        way()
    before = misses()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "build", _refuse)
        for way in ways(name, *CALLS[name](case)):
            way()
    assert misses() == before


@pytest.mark.parametrize("name", RANDOMIZED)
def test_second_estimate_builds_no_network(name):
    case = Case(2, 1, 3, 2, (12,), (12,), 3, 1, 1, 1)
    tensors, hyper = CALLS[name.replace("randomized", "conv")](case)
    hyper |= {"keep_channels": 0.5, "keep_positions": 0.5}
    for way in ways(name, tensors, hyper):
        way()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "build", _refuse)
        for way in ways(name, tensors, hyper):
            way()


def _refuse(*args, **kwargs):
    raise AssertionError("a network was built in the second call")


def test_other_shapes_are_other_plans():
    """The cache tells batches, sizes and hyper-parameters apart."""
    x = torch.randn(4, 2, 9, dtype=torch.float64)
    expressions.kfac_reduce(x, 3)
    for other, hyper in [
        (x[:2], {"kernel_size": 3}),
        (x[..., :7], {"kernel_size": 3}),
        (x, {"kernel_size": 2}),
        (x, {"kernel_size": 3, "padding": (1,)}),
        (x, {"kernel_size": 3, "padding": ((0, 1),)}),
        (x, {"kernel_size": 3, "groups": 2}),
    ]:
        expected = reference.kfac_reduce(other, **hyper)
        torch.testing.assert_close(expressions.kfac_reduce(other, **hyper), expected)


def test_caches_are_bounded():
    assert all(cache.cache_parameters()["maxsize"] is not None for cache in caches().values())
