"""Grams of windows: the reference by definition, the Triton kernel by the reference."""

from __future__ import annotations

import sys
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.curvature.tapping import recipe_of
from tests.kernels.interpreted import DEVICE, needs_kernels, run_interpreted
from tests.kernels.test_window_sum import axes
from tn_kfac.curvature.statistics import statistics
from tn_kfac.kernels.available import INTERPRETED
from tn_kfac.kernels.window_gram import window_gram, window_gram_reference
from tn_kfac.tensor_network.pattern import SpatialAxis

DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
"""Triton's interpreter has no products of bfloat16."""


@given(
    kernel=st.tuples(*[st.integers(1, 3)] * 2), stride=st.integers(1, 3), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), groups=st.integers(1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_reference_is_the_gram_of_the_unfolded_input(
    kernel, stride, padding, dilation, groups, seed
):
    torch.manual_seed(seed)
    x = torch.randn(2, 3 * groups, 6, 7, dtype=torch.float64)
    rows = F.unfold(x, kernel, dilation, padding, stride)
    rows = rows.unflatten(1, (groups, -1)).movedim(0, 2).flatten(2)
    spatial = [
        SpatialAxis(size, k, stride, (padding, padding), dilation)
        for size, k in zip(x.shape[2:], kernel, strict=True)
    ]
    found = window_gram_reference(x, spatial, groups, torch.float64)
    torch.testing.assert_close(found, rows @ rows.mT, rtol=1e-12, atol=1e-12)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, tuple[SpatialAxis, ...], int]:
    """Inputs in all ways in which they may lie in memory."""
    spatial = tuple(draw(st.lists(axes(), min_size=1, max_size=2)))
    groups = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 5)), groups * 8 * draw(st.sampled_from((1, 2, 5))))
    pixels = [axis.input_size for axis in spatial]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    match draw(st.sampled_from(("channels first", "channels last", "strided"))):
        case "channels last":
            x = torch.randn(shape[0], *pixels, shape[1], generator=generator).movedim(-1, 1)
        case "strided":
            x = torch.randn(*shape, *pixels, 2, generator=generator)[..., 0]
        case _:
            x = torch.randn(*shape, *pixels, generator=generator)
    return x.to(DEVICE, draw(st.sampled_from(DTYPES))), spatial, groups


def agree(x: Tensor, spatial: tuple[SpatialAxis, ...], groups: int) -> None:
    found = window_gram(x, spatial, groups)
    if prod(axis.kernel_size for axis in spatial) == 1:
        assert found is None
        return
    assert found is not None
    assert found.dtype == torch.float32
    expected = window_gram_reference(x, spatial, groups, torch.float64)
    assert found.shape == expected.shape
    scale = expected.diagonal(dim1=1, dim2=2).amax().clamp(min=1.0)
    assert (found.double() - expected).abs().max() <= 2e-5 * scale
    assert torch.equal(found, found.mT)
    assert torch.equal(found, window_gram(x, spatial, groups))


@needs_kernels
@given(calls())
def test_kernel_is_the_reference(call):
    agree(*call)


CASES = {
    "many rows": (3, 16, 1, [(40, 3, 1, (1, 1), 1), (33, 3, 1, (1, 1), 1)]),
    "several tiles": (2, 64, 1, [(5, 3, 2, (1, 1), 1), (7, 3, 2, (1, 1), 1)]),
    "groups": (2, 48, 2, [(6, 2, 2, (0, 0), 1), (6, 2, 2, (0, 0), 1)]),
}


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_of_larger_inputs(case, dtype):
    samples, channels, groups, spatial = CASES[case]
    spatial = tuple(SpatialAxis(*axis) for axis in spatial)
    x = torch.randn(samples, channels, *(a.input_size for a in spatial)).to(DEVICE, dtype)
    agree(x, spatial, groups)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU with 6 GB")
def test_more_entries_than_int32_counts():
    """Samples beyond 2³¹ entries count: the first and the last alone are not zero."""
    x = torch.zeros(520, 64, 256, 256, dtype=torch.bfloat16, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    x[0], x[-1] = 1.0, 2.0
    spatial = (SpatialAxis(256, 2, 2, (0, 0), 1),) * 2
    found = window_gram(x, spatial, 1)
    assert x.numel() > 2**31
    assert torch.equal(found, torch.full_like(found, 5.0 * 128 * 128))


def test_where_it_does_not_run():
    spatial = (SpatialAxis(6, 3, 1, (1, 1), 1),) * 2
    for x in (torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6).double(), torch.zeros(0, 8, 6, 6)):
        assert window_gram(x, spatial, 1) is None
    assert window_gram(torch.randn(2, 6, 6, 6).half().to(DEVICE), spatial, 1) is None  # channels


@needs_kernels
def test_layer_uses_it(monkeypatch):
    """A convolution's dense factor, with a bias, is that of the same numbers in float64."""
    room = sys.modules["tn_kfac.curvature.statistics"]
    calls = []
    spy = lambda *given: calls.append(window_gram(*given)) or calls[-1]  # noqa: E731
    monkeypatch.setattr(room, "window_gram", spy)
    layer = nn.Conv2d(8, 4, 3, padding=1, stride=2)
    x = torch.randn(3, 8, 9, 9).half()
    v = torch.randn(3, 4, 5, 5).half()
    half, exact = (
        _statistics(layer, x.to(DEVICE, dtype), v.to(DEVICE, dtype))
        for dtype in (torch.float16, torch.float64)
    )
    assert len(calls) == 1
    assert calls[0] is not None
    for found, expected in zip(half, exact, strict=True):
        assert (found.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


def _statistics(layer: nn.Conv2d, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return statistics(recipe_of(layer), (x,), v, dtype)


def test_kernel_in_the_interpreter():
    run_interpreted(__file__)
