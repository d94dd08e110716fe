"""The pattern-pair identity: exact for every stride, padding and dilation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tensor_network.oracle import evaluate
from tn_kfac.expressions import kfac_expand, kfac_reduce
from tn_kfac.tensor_network.pattern_pair import pattern_pair


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.integers(1, 2),
    extra=st.integers(0, 5),
)
def test_identity_keeps_the_value(kernel, stride, padding, dilation, extra):
    size = max(1, dilation * (kernel - 1) + 1 - sum(padding)) + extra
    x = torch.randn(2, 2, size, dtype=torch.float64)
    network = kfac_expand.expression(x, kernel, stride, (padding,), dilation).network
    paired = pattern_pair(network)
    assert paired is not None
    assert not any(axis.startswith("o") for axis, _ in paired.sizes)
    assert pattern_pair(paired) is None
    expected = evaluate(network, {"x": x})
    torch.testing.assert_close(evaluate(paired, {"x": x}), expected, rtol=1e-12, atol=1e-12)


def test_patterns_that_share_no_windows_are_left_alone():
    assert pattern_pair(kfac_reduce.expression(torch.zeros(1, 1, 5), 2).network) is None
