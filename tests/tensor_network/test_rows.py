"""Kronecker factors of a network of rows, against sums of outer products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensor_network.oracle import evaluate
from tensor_network.strategies import forwards, integers, tensors_of
from tn_kfac.tensor_network.rows import channel_rows

APPROXIMATIONS = st.sampled_from(["expand", "reduce"])


def rows_of(rows, tensors):
    """The rows as (samples, positions, groups, features)."""
    sample, shared = rows.sample, rows.shared
    value = evaluate(rows.network.arranged(sample, shared, rows.group, rows.feature), tensors)
    return value.reshape(rows.samples, rows.positions, *value.shape[-2:])


def summed(rows, approx, mean):
    """The rows that outer products are taken of: each one, or one per sample."""
    if approx == "expand":
        return rows.flatten(0, 1)
    return rows.mean(1) if mean else rows.sum(1)


@st.composite
def any_rows(draw):
    """The rows of a convolution's input, or of a tensor's channels."""
    if draw(st.booleans()):
        return draw(forwards(dims=2)).rows()
    sizes = [draw(st.integers(1, 3)) for _ in range(3)]
    return channel_rows("v", *sizes, draw(st.lists(st.integers(1, 3), max_size=3)))


@given(any_rows(), APPROXIMATIONS, st.booleans())
def test_factor_is_a_sum_of_outer_products(rows, approx, mean):
    tensors = tensors_of(rows.network)
    expected = sum(
        row[:, :, None] * row[:, None, :] for row in summed(rows_of(rows, tensors), approx, mean)
    )
    actual = evaluate(rows.factor(approx, mean=mean), tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@given(any_rows(), APPROXIMATIONS, st.data())
def test_tied_axes_are_on_the_diagonal(rows, approx, data):
    tensors = tensors_of(rows.network)
    size = [rows.network.size[axis] for axis in rows.feature]
    tied = data.draw(st.lists(st.sampled_from(rows.feature), unique=True))
    factor = evaluate(rows.factor(approx), tensors).unflatten(2, size).unflatten(1, size)
    free = [axis for axis in rows.feature if axis not in tied]
    labels = dict(zip(rows.feature, "abcdefg", strict=False))
    left = "".join(labels[axis] for axis in rows.feature)
    right = "".join(labels[axis].upper() if axis in free else labels[axis] for axis in rows.feature)
    output = left + "".join(labels[axis].upper() for axis in free)
    expected = torch.einsum(f"z{left}{right}->z{output}", factor)
    network = rows.factor(approx, tied=tuple(tied))
    order = (*rows.group, *rows.feature, *(f"{axis}'" for axis in free))
    actual = evaluate(network.arranged(*((axis,) for axis in order)), tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


@given(any_rows(), APPROXIMATIONS, st.booleans())
def test_total_is_the_sum_of_rows(rows, approx, mean):
    tensors = tensors_of(rows.network)
    expected = summed(rows_of(rows, tensors), approx, mean).sum(0)
    actual = evaluate(rows.total(approx, mean=mean), tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("spatial", [(), (4,), (2, 3)])
def test_channels_are_rows(spatial):
    v = integers(2, 6, *spatial)
    rows = channel_rows("v", 2, 3, 2, spatial)
    expected = v.reshape(2, 3, 2, -1).permute(0, 3, 1, 2)
    assert torch.equal(rows_of(rows, {"v": v}), expected)
