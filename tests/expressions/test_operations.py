"""Each operation, for all hyper-parameters and N = 1..6, against the reference geometry.

Three ways must agree in float64 to 1e-12: the call, and `einsum_expression` through
torch.einsum, simplified and not.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expressions import reference
from expressions.calls import CALLS, cases_of
from expressions.strategies import examples
from tn_kfac import expressions

NOT_OPERATIONS = {"draw", "explain", "Expression", "Operation", "RandomizedOperation", "operation"}
RANDOMIZED = {"randomized_input_vjp", "randomized_weight_vjp"}  # test_randomized.py


def evaluated(operation, tensors, hyper, simplify):
    equation, operands, shape = operation.einsum_expression(
        *tensors.values(), **hyper, simplify=simplify
    )
    value = torch.einsum(equation, *operands).reshape(shape)
    assert tuple(value.shape) == tuple(shape)
    return value


def test_every_public_operation_is_tested():
    assert set(expressions.__all__) - NOT_OPERATIONS == CALLS.keys() | RANDOMIZED


@pytest.mark.parametrize("name", CALLS)
@examples(2)
@given(data=st.data())
def test_call_equals_reference(name, data):
    tensors, hyper = CALLS[name](data.draw(cases_of(name)))
    expected = getattr(reference, name)(*tensors.values(), **hyper)
    actual = getattr(expressions, name)(*tensors.values(), **hyper)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
@examples(1.5)
@given(data=st.data(), simplify=st.booleans())
def test_equation_equals_reference(name, data, simplify):
    tensors, hyper = CALLS[name](data.draw(cases_of(name)))
    expected = getattr(reference, name)(*tensors.values(), **hyper)
    actual = evaluated(getattr(expressions, name), tensors, hyper, simplify)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
@examples(0.5)
@given(data=st.data(), limit=st.integers(1, 60))
def test_memory_limit_keeps_the_value(name, data, limit):
    tensors, hyper = CALLS[name](data.draw(cases_of(name)))
    expected = getattr(reference, name)(*tensors.values(), **hyper)
    actual = getattr(expressions, name).limited(limit)(*tensors.values(), **hyper)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [0, -1])
def test_impossible_memory_limits(limit):
    with pytest.raises(ValueError, match=f"memory_limit.*{limit}"):
        expressions.kfac_expand.limited(limit)


def test_explanations_are_of_the_plan_that_a_call_follows():
    x = torch.zeros(8, 8, 16, 16)
    assert "slices" not in expressions.explain(expressions.kfac_expand.expression(x, 3, 2))
    limited = expressions.kfac_expand.limited(1000).expression(x, 3, 2)
    assert "slices" in expressions.explain(limited)
    plain = expressions.kfac_expand.expression(x, 3, 2, simplify=False)
    assert "Π" in expressions.explain(plain) and "rules" not in expressions.explain(plain)
