"""Index patterns, their sums and their tensors, against the definition entry by entry."""

import pytest
import torch
from expressions.strategies import axes, examples
from hypothesis import given
from hypothesis import strategies as st

from tensor_network.oracle import pattern_entries
from tensor_network.strategies import spatial_axes
from tn_kfac.tensor_network.execute import pattern_tensor
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis

CPU = torch.device("cpu")
NAMES = ("k", "o", "i")


def summed_entries(axis, legs):
    """Π summed over the legs that are None."""
    gone = [dim for dim, leg in enumerate(legs) if leg is None]
    return pattern_entries(axis).sum(gone) if gone else pattern_entries(axis)


def legs_of(draw):
    """Each leg of a pattern open or summed over."""
    return draw(st.tuples(*(st.sampled_from([name, None]) for name in NAMES)))


@given(st.sampled_from([1, 2, 3]).flatmap(axes))
def test_sizes_are_those_of_the_windows_that_fit(drawn):
    axis = SpatialAxis(drawn.input, drawn.kernel, drawn.stride, drawn.padding, drawn.dilation)
    last = [pixel for pixel in range(axis.reach) if pixel % axis.dilation == 0][-1]
    assert last == (axis.kernel_size - 1) * axis.dilation == axis.reach - 1
    pixels = axis.input_size + sum(axis.padding)
    fitting = [o for o in range(pixels) if o * axis.stride + last < pixels]
    assert axis.output_size == len(fitting)
    assert axis.extents == pattern_entries(axis).shape


@examples(3)
@given(spatial_axes(), st.data())
def test_tensor_is_the_definition(axis, data):
    legs = legs_of(data.draw)
    tensor = pattern_tensor(Pattern(axis, *legs), torch.float64, CPU)
    assert torch.equal(tensor, summed_entries(axis, legs))


@examples(2)
@given(spatial_axes())
def test_count_is_the_number_of_ones(axis):
    assert Pattern(axis, None, None, None).count() == pattern_entries(axis).sum()


@given(spatial_axes(), st.sampled_from(NAMES))
def test_summed_pattern_loses_that_leg(axis, name):
    pattern = Pattern(axis, *NAMES).summed(name)
    legs = tuple(leg if leg != name else None for leg in NAMES)
    assert pattern == Pattern(axis, *legs)
    assert not pattern.is_full
    assert Pattern(axis, *NAMES).is_full


@given(spatial_axes())
def test_two_indices_determine_the_third(axis):
    """What the rule of pattern collapse rests on."""
    entries = pattern_entries(axis)
    assert all(entries.sum(dim).le(1).all() for dim in range(3))


LARGE = [
    SpatialAxis(5003, 2, stride=1, padding=(1, 0), dilation=2049),
    SpatialAxis(4099, 3, stride=2, padding=(2, 1), dilation=1021),
    SpatialAxis(2100, 2, stride=1, padding=(0, 3), dilation=2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", LARGE)
@pytest.mark.parametrize("legs", [("k", None, "i"), ("k", "o", None)])
def test_large_tensors_are_exact(axis, legs, dtype):
    """Sizes over 2048, where float16, bfloat16 and TF32 no longer hold every integer."""
    k, o = torch.arange(axis.kernel_size)[:, None], torch.arange(axis.output_size)
    i = o * axis.stride + k * axis.dilation - axis.padding[0]
    real = (i >= 0) & (i < axis.input_size)
    if legs[2] is None:
        expected = real.to(dtype)
    else:
        expected = torch.zeros(axis.kernel_size, axis.input_size, dtype=dtype)
        expected[k.expand_as(i)[real], i[real]] = 1
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        tensor = pattern_tensor(Pattern(axis, *legs), dtype, CPU)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert tensor.dtype == dtype
    assert torch.equal(tensor, expected)


def test_large_full_tensor_is_exact():
    axis = LARGE[2]
    tensor = pattern_tensor(Pattern(axis, *NAMES), torch.float32, CPU)
    k, o, i = (torch.arange(size) for size in axis.extents)
    expected = i == o[:, None] * axis.stride + k[:, None, None] * axis.dilation - axis.padding[0]
    assert torch.equal(tensor, expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_large_counts_are_rounded_once(name, dtype):
    """Counts over 256 are not sums in bfloat16, where 256 + 1 is 256."""
    axis = SpatialAxis(2500, 700, padding=(300, 0))
    legs = tuple(leg if leg == name else None for leg in NAMES)
    expected = summed_counts(axis, name).to(dtype)
    assert torch.equal(pattern_tensor(Pattern(axis, *legs), dtype, CPU), expected)


def summed_counts(axis, name):
    """The number of (window, kernel) pairs at each index of one leg, from their pixels."""
    k, o = torch.arange(axis.kernel_size)[:, None], torch.arange(axis.output_size)
    i = o * axis.stride + k * axis.dilation - axis.padding[0]
    real = (i >= 0) & (i < axis.input_size)
    index = {"k": k.expand_as(i), "o": o.expand_as(i), "i": i}[name][real]
    return torch.bincount(index, minlength=dict(zip(NAMES, axis.extents, strict=True))[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_large_tensors_are_exact_with_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    pattern = Pattern(LARGE[1], "k", None, "i")
    actual = pattern_tensor(pattern, torch.float32, torch.device("cuda"))
    assert torch.equal(actual.cpu(), pattern_tensor(pattern, torch.float32, CPU))
