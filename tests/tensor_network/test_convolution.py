"""The networks of convolutions against the reference geometry, through the oracle."""

import torch
from expressions import reference
from expressions.strategies import cases, transposed_cases
from hypothesis import given
from hypothesis import strategies as st

from tensor_network.oracle import evaluate
from tn_kfac.tensor_network.convolution import convolution, transposed_convolution

few = st.sampled_from([1, 2, 3])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def of(build, case):
    shape = (case.batch, case.in_channels, *case.input_size)
    return build(shape, case.kernel_size, out_channels=case.out_channels, **case.hyper)


@given(cases(few))
def test_forward_network_is_the_convolution(case):
    conv, tensors = of(convolution, case), {"x": case.x(), "weight": case.weight()}
    expected = reference.conv_forward(**tensors, **case.hyper)
    assert conv.output_size == case.output_size
    assert conv.network().shape == expected.shape
    close(evaluate(conv.network(), tensors), expected)


@given(transposed_cases(few))
def test_forward_network_is_the_transposed_convolution(case):
    conv, tensors = of(transposed_convolution, case), {"x": case.x(), "weight": case.weight()}
    expected = reference.conv_transpose_forward(**tensors, **case.hyper)
    assert conv.output_size == case.output_size
    assert conv.network().shape == expected.shape
    close(evaluate(conv.network(), tensors), expected)


def check_rows(conv, x, columns):
    """Rows [n, o…, g, (c k…)] are the columns (n, g·c·K, O), the other way round."""
    by_group = columns.reshape(len(x), conv.groups, -1, columns.shape[-1])
    expected = by_group.permute(0, 3, 1, 2).unflatten(1, conv.output_size)
    rows = conv.rows()
    assert (rows.samples, rows.positions) == (len(x), columns.shape[-1])
    close(evaluate(rows.network, {"x": x}), expected)


@given(cases(few))
def test_rows_are_the_unfolded_input(case):
    columns = reference.unfold_input(case.x(), case.kernel_size, **case.hyper)
    check_rows(of(convolution, case), case.x(), columns)


@given(transposed_cases(few))
def test_rows_are_the_unfolded_input_of_the_transposed_convolution(case):
    columns = reference.unfold_input_transpose(case.x(), case.kernel_size, **case.hyper)
    check_rows(of(transposed_convolution, case), case.x(), columns)


@given(cases())
def test_one_entry_serves_every_axis(case):
    """An int, one entry, and one entry per axis are the same hyper-parameter."""
    dims = len(case.input_size)
    shape = (case.batch, case.in_channels, *case.input_size)
    least = tuple(max(1, 2 - size) for size in case.input_size)  # so that 2 pixels fit
    forms = [2, (2,), [2] * dims, (2,) * dims]
    built = {convolution(shape, form, padding=least) for form in forms}
    built |= {convolution(shape, 2, 1, least, dilation=form) for form in (1, (1,), [1] * dims)}
    assert len(built) == 1
    pads = [1, (1,), (1,) * dims, ((1, 1),), [[1, 1]] * dims]
    assert len({convolution(shape, 2, padding=pad) for pad in pads}) == 1
