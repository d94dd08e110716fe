"""Randomised VJPs: an estimate is the exact VJP of what was sampled, and unbiased."""

from itertools import combinations, product
from math import ceil, prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from expressions import reference
from expressions.calls import CONVOLUTION
from expressions.strategies import Case, cases, examples
from tn_kfac.expressions import (
    conv_input_vjp,
    conv_weight_vjp,
    randomized_input_vjp,
    randomized_weight_vjp,
)

# The randomised operation, the exact one, and the tensor whose channels are sampled.
PAIRS = {
    "conv_weight_vjp": (randomized_weight_vjp, conv_weight_vjp, "x"),
    "conv_input_vjp": (randomized_input_vjp, conv_input_vjp, "v"),
}
CASE = Case(2, 1, 3, 2, (12,), (12,), 3, 1, 1, 1)  # kernel size 3, padding 1
few = st.sampled_from([1, 1, 2])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def masks(size, keep):
    """Each choice of ⌈keep·size⌉ of so many indices, weighted by size/⌈keep·size⌉."""
    kept = ceil(keep * size)
    for chosen in combinations(range(size), kept):
        mask = torch.zeros(size, dtype=torch.float64)
        mask[list(chosen)] = size / kept
        yield mask


def possible(name, tensors, hyper, keep_channels, keep_positions):
    """The estimates of all samples: the exact VJP of masked and rescaled tensors."""
    sampled = PAIRS[name][2]
    groups = hyper["groups"]
    per_group = tensors[sampled].shape[1] // groups
    positions = tensors["v"].shape[2:]
    for channels, *rest in product(
        masks(per_group, keep_channels), *(masks(size, keep_positions) for size in positions)
    ):
        masked = dict(tensors)
        weights = channels.repeat(groups)
        masked[sampled] = masked[sampled] * weights.reshape(-1, *[1] * len(positions))
        for dim, mask in enumerate(rest):
            masked["v"] = masked["v"] * mask.reshape(-1, *[1] * (len(rest) - 1 - dim))
        yield getattr(reference, name)(*masked.values(), **hyper)


@pytest.mark.parametrize("name", PAIRS)
@examples(1.5)
@given(
    case=cases(few),
    keep=st.tuples(*[st.sampled_from([0.01, 0.3, 0.5, 0.75, 1.0])] * 2),
    seed=st.integers(0, 2**32),
    simplify=st.booleans(),
)
def test_an_estimate_is_the_vjp_of_what_was_kept(name, case, keep, seed, simplify):
    assume(prod(case.output_size) <= 12)
    tensors, hyper = CONVOLUTION[name](case)
    arguments = {"keep_channels": keep[0], "keep_positions": keep[1], "simplify": simplify}
    operation = PAIRS[name][0]
    estimate = operation(*tensors.values(), **hyper, **arguments, generator=generator(seed))
    values = possible(name, tensors, hyper, *keep)
    assert any(torch.allclose(estimate, value, rtol=1e-10, atol=1e-10) for value in values)
    equation, operands, shape = operation.einsum_expression(
        *tensors.values(), **hyper, **arguments, generator=generator(seed)
    )
    same = torch.einsum(equation, *operands).reshape(shape)
    torch.testing.assert_close(same, estimate, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", PAIRS)
@given(case=cases(few))
def test_keeping_everything_is_exact(name, case):
    tensors, hyper = CONVOLUTION[name](case)
    randomized, exact, _ = PAIRS[name]
    for everything in ({}, {"keep_channels": 1.0, "keep_positions": 1}):
        actual = randomized(*tensors.values(), **hyper, **everything)
        assert torch.equal(actual, exact(*tensors.values(), **hyper))


SAMPLES = 400


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("keep", [(0.5, 1.0), (1.0, 0.5), (0.5, 0.6)])
def test_the_mean_of_estimates_is_the_exact_vjp(name, keep):
    """To five standard errors; and the estimates do differ, by as much as all samples do."""
    x, v = torch.randn(2, 6, 6, dtype=torch.float64), torch.randn(2, 8, 6, dtype=torch.float64)
    weight = torch.randn(8, 3, 3, dtype=torch.float64)
    hyper = {"padding": 1, "groups": 2}
    if name == "conv_weight_vjp":
        tensors, hyper = {"x": x, "v": v}, hyper | {"kernel_size": 3}
    else:
        tensors, hyper = {"weight": weight, "v": v}, hyper | {"input_size": 6}
    randomized, exact, _ = PAIRS[name]
    expected = exact(*tensors.values(), **hyper)
    hyper |= {"keep_channels": keep[0], "keep_positions": keep[1], "generator": generator(0)}
    estimates = [randomized(*tensors.values(), **hyper) for _ in range(SAMPLES)]
    deviation = torch.stack(estimates).std(0)
    assert deviation.max() > 0.1
    error = (torch.stack(estimates).mean(0) - expected).abs()
    assert (error <= 5 * deviation / SAMPLES**0.5 + 1e-9).all()


@pytest.mark.parametrize("name", PAIRS)
def test_the_generator_decides(name):
    tensors, hyper = CONVOLUTION[name](CASE)
    arguments = hyper | {"keep_positions": 0.3}
    operation = PAIRS[name][0]
    first, second, other = (
        operation(*tensors.values(), **arguments, generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    first = operation(*tensors.values(), **arguments)
    assert not torch.equal(first, operation(*tensors.values(), **arguments))
    torch.manual_seed(0)
    assert torch.equal(first, operation(*tensors.values(), **arguments))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("argument", ["keep_channels", "keep_positions"])
@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_impossible_fractions(name, argument, value):
    tensors, hyper = CONVOLUTION[name](CASE)
    with pytest.raises(ValueError, match=rf"{argument}.*{value}"):
        PAIRS[name][0](*tensors.values(), **hyper, **{argument: value})


@pytest.mark.parametrize("argument", ["keep_channels", "keep_positions"])
@pytest.mark.parametrize("value", ["half", None, (0.5, 0.5)])
def test_fractions_that_are_no_numbers(argument, value):
    tensors, hyper = CONVOLUTION["conv_weight_vjp"](CASE)
    with pytest.raises(TypeError, match=argument):
        randomized_weight_vjp(*tensors.values(), **hyper, **{argument: value})
