"""What `explain` says is true: equations, rules, lowering, and costs of the chosen plan."""

import re

import pytest
import torch
from expressions.calls import CALLS, cases_of
from hypothesis import given
from hypothesis import strategies as st

from tn_kfac import expressions
from tn_kfac.expressions import explain
from tn_kfac.tensor_network.lower import PARTS, WHOLE
from tn_kfac.tensor_network.simplify import RULES
from tn_kfac.tensor_network.simplify import simplify as simplified
from tn_kfac.tensor_network.slicing import plan


def lines(text, head):
    """What stands behind a word at the beginning of lines."""
    return [line[len(head) :].strip() for line in text.splitlines() if line.startswith(head)]


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
def test_explanation(name, data):
    tensors, hyper = CALLS[name](data.draw(cases_of(name)))
    operation = getattr(expressions, name)
    expression = operation.expression(*tensors.values(), **hyper)
    text = explain(expression)
    for head, simplify in (("equation", False), ("simplified", True)):
        (said,) = lines(text, head)
        equation, _, shape = operation.einsum_expression(
            *tensors.values(), **hyper, simplify=simplify
        )
        network = simplified(expression.network) if simplify else expression.network
        if network.scale != 1:  # an operand without axes, that is last
            equation = equation.replace(",->", "->")
        assert equation in said
        assert f"shape {tuple(shape)}" in said
    (rules,), (lowering,) = lines(text, "rules"), lines(text, "lowering")
    named = re.findall(r"([a-z -]+) ×\d+", rules)
    assert {rule.strip() for rule in named} <= RULES.keys()
    assert named or rules == "none applies"
    named = re.findall(r"([a-z -]+) ×\d+", lowering)
    assert {kind.strip() for kind in named} <= {*WHOLE, *PARTS}
    assert named or "einsum" in lowering
    made = plan(expression.network)
    (costs,) = lines(text, "this plan")
    said = [float(number) for number in costs.split()]
    actual = [made.flops, 4 * made.traffic, 4 * made.peak]
    assert said == pytest.approx(actual, rel=6e-3)


def test_explanation_of_known_layers():
    """A padded convolution: window sums for KFAC-reduce, and no unfolded input."""
    x = torch.empty(8, 16, 14, 14)
    text = explain(expressions.kfac_reduce.expression(x, 3, padding=1))
    assert lines(text, "rules") == ["summed pattern ×4, squeeze ×1"]
    assert lines(text, "lowering") == ["window sum ×2"]
    ours, theirs = (
        [float(number) for number in lines(text, head)[0].split()]
        for head in ("this plan", "by unfolding")
    )
    assert theirs[2] == pytest.approx(8 * 16 * 9 * 14 * 14 * 4, rel=6e-3)
    assert ours[2] < theirs[2] / 8
    assert ours[1] < theirs[1] / 4
