"""The three ways to correlate pixels agree with all windows, written out."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tn_kfac.expressions import kfac_expand
from tn_kfac.tensor_network.pattern import SpatialAxis
from tn_kfac.tensor_network.primitives import correlation


@st.composite
def axes(draw: st.DrawFn) -> SpatialAxis:
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return SpatialAxis(draw(st.integers(1, 6)), kernel, 1, (kernel * dilation,) * 2, dilation)


def by_definition(x: torch.Tensor, spatial: list[SpatialAxis], groups: int) -> torch.Tensor:
    """Unfold x with so much padding that no window that meets it is missing."""
    margins = [(a.kernel_size - 1) * a.dilation for a in spatial]
    windows = F.pad(x, [m for margin in reversed(margins) for m in (margin, margin)])
    for dim, a in enumerate(spatial, start=2):
        windows = windows.unfold(dim, a.reach, 1)[..., :: a.dilation]
    channels = x.shape[1] // groups
    rows = windows.movedim(1, len(spatial) + 1).flatten(0, len(spatial))
    kernels = [a.kernel_size for a in spatial]
    rows = rows.reshape(-1, groups, channels * prod(kernels))
    gram = torch.einsum("rgi,rgj->gij", rows, rows)
    return gram.reshape(groups, channels, *kernels, channels, *kernels)


@pytest.mark.parametrize("padding", [0.0, 1e9], ids=["overlapping", "shifted"])
@given(
    spatial=st.lists(axes(), min_size=1, max_size=3),
    batch=st.integers(1, 5),
    channels=st.integers(1, 3),
    part=st.sampled_from([1, 50, 10**6]),
)
def test_products_are_the_definition_in_parts_of_any_size(padding, spatial, batch, channels, part):
    x = torch.randn(batch, channels, *(a.input_size for a in spatial), dtype=torch.float64)
    kernels = [a.kernel_size for a in spatial]
    factor = x.new_empty(1, channels, *kernels, channels, *kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correlation, "MOST_PADDING", padding)
        patch.setattr(correlation, "PART", part)
        patch.setattr(correlation, "WHOLE", part)
        correlation._write_products(factor, x, spatial)
    expected = by_definition(x, spatial, 1)
    torch.testing.assert_close(factor, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("way", ["transforms", "convolution"])
@given(
    spatial=st.lists(axes(), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    channels=st.integers(1, 3),
)
def test_each_way_is_the_definition(way, spatial, batch, groups, channels):
    shape = (batch, groups * channels, *(a.input_size for a in spatial))
    x = torch.randn(shape, dtype=torch.float64)
    kernels = [a.kernel_size for a in spatial]
    factor = x.new_empty(groups, channels, *kernels, channels, *kernels)
    correlated = getattr(correlation, f"_by_{way}")(x, spatial, groups)
    correlation._write_windows(factor, correlated)
    expected = by_definition(x, spatial, groups)
    torch.testing.assert_close(factor, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("channels", [1, 4, 6])
@pytest.mark.parametrize("groups", [1, 2])
def test_all_windows_chooses_among_them(channels, groups):
    spatial = [SpatialAxis(5, 3, 1, (1, 1)), SpatialAxis(4, 2, 1, (0, 0))]
    x = torch.randn(2, groups * channels, 5, 4, dtype=torch.float64)
    expected = by_definition(x, spatial, groups)
    actual = correlation.all_windows(x, spatial, groups, x.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_correlations_are_differentiable():
    """Also where products of shifted rows form them."""
    x = torch.randn(2, 8, 40, 40, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(72, 72, dtype=torch.float64)
    (ours,) = torch.autograd.grad((kfac_expand(x, 3)[0] * weight).sum(), x)
    rows = F.unfold(x, 3).permute(0, 2, 1).flatten(0, 1)
    (expected,) = torch.autograd.grad((rows.T @ rows / 2 * weight).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
