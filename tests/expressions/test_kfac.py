"""Kronecker factors of KFAC: the promised call, shapes, normalisation and groups."""

import inspect

import pytest
import torch
from hypothesis import given

from expressions import reference
from expressions.strategies import cases
from tn_kfac import expressions
from tn_kfac.expressions import kfac_expand, kfac_reduce, unfold_input

FACTORS = {"kfac_expand": kfac_expand, "kfac_reduce": kfac_reduce}
WORDS = "(x, kernel_size, stride=1, padding=0, dilation=1, groups=1, simplify=True)"


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FACTORS)
@given(case=cases())
def test_the_call_word_for_word(name, case):
    """All arguments by position, and all but the tensor by keyword."""
    x, operation = case.x(), FACTORS[name]
    kernel_size, stride, padding = case.kernel_size, case.stride, case.padding
    dilation, groups = case.dilation, case.groups
    expected = getattr(reference, name)(x, kernel_size, **case.hyper)
    for simplify in (True, False):
        equation, operands, shape = operation.einsum_expression(
            x, kernel_size, stride, padding, dilation, groups, simplify
        )
        close(torch.einsum(equation, *operands).reshape(shape), expected)
    equation, operands, shape = operation.einsum_expression(
        x,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        simplify=True,
    )
    close(torch.einsum(equation, *operands).reshape(shape), expected)
    assert isinstance(equation, str)
    assert tuple(shape) == (groups, case.features, case.features)
    close(operation(x, kernel_size, stride, padding, dilation, groups), expected)


@pytest.mark.parametrize("operation", [kfac_expand, kfac_reduce, unfold_input])
def test_defaults_are_those_of_torch(operation):
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    hyper = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "simplify": True}
    assert torch.equal(operation(x, 3), operation(x, 3, **hyper))
    parameters = inspect.signature(operation).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == WORDS


@pytest.mark.parametrize("name", FACTORS)
@given(case=cases())
def test_factors_are_means_over_samples(name, case):
    """A batch that is repeated has the same factor."""
    x = case.x()
    once = FACTORS[name](x, case.kernel_size, **case.hyper)
    close(FACTORS[name](torch.cat([x, x, x]), case.kernel_size, **case.hyper), once)


@given(cases())
def test_reduce_is_normalised_by_positions_squared(case):
    """Of rows that are all alike, expand has O times the factor that reduce has."""
    x = torch.ones(case.batch, case.in_channels, *case.input_size, dtype=torch.float64)
    hyper = case.hyper | {"padding": 0, "dilation": 1}
    kernel = tuple(min(pair) for pair in zip(case.kernel_shape, case.input_size, strict=True))
    rows = unfold_input(x, kernel, **hyper)
    assert torch.equal(rows, torch.ones_like(rows))
    expand, reduce = (f(x, kernel, **hyper) for f in (kfac_expand, kfac_reduce))
    close(reduce, torch.ones_like(reduce))
    close(expand, rows.shape[-1] * reduce)


@pytest.mark.parametrize("name", ["kfac_expand", "kfac_reduce"])
@given(case=cases())
def test_each_group_has_a_factor_of_its_own(name, case):
    """The factor of a group is that of a convolution of the group's channels."""
    hyper = case.hyper | {"groups": 1}
    factors = FACTORS[name](case.x(), case.kernel_size, **case.hyper)
    alone = [
        FACTORS[name](x, case.kernel_size, **hyper).squeeze(0)
        for x in case.x().chunk(case.groups, 1)
    ]
    close(factors, torch.stack(alone))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@given(case=cases())
def test_diagonal_and_blocks_are_those_of_the_factor(approx, case):
    factor = getattr(expressions, f"kfac_{approx}")(case.x(), case.kernel_size, **case.hyper)
    diagonal, blocks = (
        getattr(expressions, f"kfac_{approx}_{part}")(case.x(), case.kernel_size, **case.hyper)
        for part in ("diagonal", "block_diagonal")
    )
    close(diagonal, factor.diagonal(0, 1, 2))
    channels = case.in_channels // case.groups
    factor = factor.unflatten(2, (channels, -1)).unflatten(1, (channels, -1))
    close(blocks, torch.einsum("gckcl->gckl", factor))
    close(blocks.diagonal(0, 2, 3).flatten(1), diagonal)
