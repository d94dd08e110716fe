"""Simplification keeps the value of every network, rule by rule and at the fixed point."""

import torch
from expressions.strategies import examples
from hypothesis import event, given
from hypothesis import strategies as st

from tensor_network.oracle import evaluate
from tensor_network.strategies import Drawn, derived, networks
from tn_kfac.tensor_network.simplify import RULES, simplify, traced

MOST_STEPS = 60  # far more than any of the drawn networks needs in any order


def keeps_value(drawn, after, rule):
    expected, actual = (evaluate(n, drawn.tensors) for n in (drawn.network, after))
    assert actual.shape == expected.shape, f"{rule}: {actual.shape} is not {expected.shape}"
    message = f"{rule} turns {drawn.network}\ninto {after}"
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0, msg=message)


def in_any_order(drawn, data):
    """Apply rules that fire, whichever is drawn, until none does; check all that could."""
    for _ in range(MOST_STEPS):
        fired = {name: rule(drawn.network) for name, rule in RULES.items()}
        fired = {name: after for name, after in fired.items() if after is not None}
        if not fired:
            return
        for name, after in fired.items():
            event(name)
            keeps_value(drawn, after, name)
        chosen = data.draw(st.sampled_from(sorted(fired)))
        drawn = Drawn(fired[chosen], drawn.tensors)
    raise AssertionError(f"the rules do not end: {drawn.network}")


@examples(5)
@given(networks(), st.data())
def test_rules_keep_the_value_of_any_network(drawn, data):
    in_any_order(drawn, data)


@examples(3)
@given(derived(), st.data())
def test_rules_keep_the_value_of_networks_from_convolutions(drawn, data):
    in_any_order(drawn, data)


@examples(3)
@given(st.one_of(networks(), derived()))
def test_fixed_point_keeps_the_value_and_no_rule_applies_to_it(drawn):
    after = simplify(drawn.network)
    keeps_value(drawn, after, "simplify")
    assert all(rule(after) is None for rule in RULES.values())
    assert traced(drawn.network)[0] == after
    assert simplify(after) == after
