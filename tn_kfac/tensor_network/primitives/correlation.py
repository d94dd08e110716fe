"""Grams of all windows that meet an image, from the correlations between its pixels.

With δ = k' − k, the sum of all windows' outer products has at (c, k, c', k') the correlation

    R[c, c', δ] = Σ_i x[c, i] x[c', i + δ·dilation],    R[c', c, −δ] = R[c, c', δ]

which is formed once for each offset δ, in one of three ways: by a matrix product for each
offset, on one padded copy of x; for few channels by Fourier transforms; for other groups by
a weight-VJP convolution of x with itself. (cuDNN's convolution in float32 was found 100 times
less accurate than the products, which need half of its multiplications and no work space.)

Errors are of the order of the largest entry, borders included: those of windows beyond the
counted ones are taken off afterwards, so that pixels at the border that are larger than the
others by orders of magnitude cost the others as many digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, product
from math import prod

import torch
from torch import Tensor

from tn_kfac.kernels.products import multiplied
from tn_kfac.tensor_network.lower.autocorrelation import FEW_CHANNELS
from tn_kfac.tensor_network.pattern import SpatialAxis

SPECTRUM_LIMIT = 1 << 22
"""Elements that are transformed at a time."""
PART, WHOLE = 1 << 21, 1 << 28
"""Elements of a correlation that are arranged at a time, and of pixels that are multiplied."""
MOST_PADDING = 1.5
"""With more padding than that, the pixels that meet are copied instead."""
Pair = tuple[Tensor, Tensor]


def all_windows(
    x: Tensor, spatial: Sequence[SpatialAxis], groups: int, dtype: torch.dtype
) -> Tensor:
    """The factor (group, c, k…, c', k'…), in `dtype`, of every window that meets the image.

    x has the shape (rows, groups · c, *spatial).
    """
    channels = x.shape[1] // groups
    kernels = [a.kernel_size for a in spatial]
    factor = x.new_empty(groups, channels, *kernels, channels, *kernels, dtype=dtype)
    if channels <= FEW_CHANNELS and not x.is_complex():
        _write_windows(factor, _by_transforms(x, spatial, groups))
    elif groups == 1:
        _write_products(factor, x, spatial)
    else:
        _write_windows(factor, _by_convolution(x.to(dtype), spatial, groups))
    return factor


def _write_windows(factor: Tensor, correlation: Tensor) -> None:
    """Write a correlation (g, c, c', δ…), whose offsets start at 1 − K, into the factor."""
    kernels = factor.shape[2 : 2 + correlation.dim() - 3]
    for offset in product(*(range(k) for k in kernels)):
        starts = (k - 1 - at for k, at in zip(kernels, offset, strict=True))
        window = tuple(slice(s, s + k) for s, k in zip(starts, kernels, strict=True))
        factor[(slice(None), slice(None), *offset)] = correlation[(..., *window)]


def _write_products(factor: Tensor, x: Tensor, spatial: Sequence[SpatialAxis]) -> None:
    """Write the correlation of one group of channels, whose negative offsets are transposes.

    A part of the channels at a time, so that little is held beside the factor.
    """
    half = _by_products(x, spatial, factor.dtype)
    offsets = [2 * a.kernel_size - 1 for a in spatial]
    rows = max(1, PART // (prod(offsets) * x.shape[1]))
    for start in range(0, x.shape[1], rows):
        part = slice(start, start + rows)
        mirrored = half[1:, :, part].flip(0).mT
        whole = torch.cat([mirrored, half[:, part]]).unflatten(0, offsets)
        _write_windows(factor[:, part], whole.movedim((-2, -1), (0, 1))[None])


def _by_products(x: Tensor, spatial: Sequence[SpatialAxis], dtype: torch.dtype) -> Tensor:
    """The correlation (δ, c, c') of one group, for half of the offsets, in order, from 0 on."""
    channels = x.shape[1]
    offsets = list(product(*(range(1 - a.kernel_size, a.kernel_size) for a in spatial)))
    offsets = offsets[len(offsets) // 2 :]
    steps = [[o * a.dilation for o, a in zip(at, spatial, strict=True)] for at in offsets]
    gaps = [(a.kernel_size - 1) * a.dilation for a in spatial]
    padded = [n + gap for n, gap in zip(x.shape[2:], gaps, strict=True)]
    pairs = _shifted if prod(padded) < MOST_PADDING * prod(x.shape[2:]) else _overlapping
    sums: list[Tensor] = []
    for part in x.split(max(1, WHOLE // (channels * prod(padded)))):
        terms = [multiplied(left.mT, right, dtype) for left, right in pairs(part, steps, padded)]
        sums = [a + b for a, b in zip(sums, terms, strict=True)] if sums else terms
    return torch.stack(sums)


def _shifted(x: Tensor, steps: list[list[int]], padded: list[int]) -> Iterator[Pair]:
    """Pixels as rows, and those that many steps further, with zeros behind each line.

    Then a step is a shift of all rows, and pixels that leave a line meet zeros.
    """
    pixels = x.new_zeros(len(x), *padded, x.shape[1])
    pixels[(slice(None), *(slice(n) for n in x.shape[2:]))] = x.movedim(1, -1)
    rows = pixels.flatten(0, -2)
    for step in steps:
        shift = sum(n * prod(padded[dim + 1 :]) for dim, n in enumerate(step))
        yield rows[: len(rows) - shift], rows[shift:]


def _overlapping(x: Tensor, steps: list[list[int]], padded: list[int]) -> Iterator[Pair]:
    """Pixels as rows, and those that many steps further, where an image has both."""
    pixels, sizes = x.movedim(1, -1).contiguous(), x.shape[2:]
    for step in steps:
        left = pixels[_reached(sizes, [-n for n in step])]
        yield left.flatten(0, -2), pixels[_reached(sizes, step)].flatten(0, -2)


def _reached(sizes: Sequence[int], step: Sequence[int]) -> tuple[slice, ...]:
    """The pixels of all images that a step from another pixel reaches."""
    pairs = zip(sizes, step, strict=True)
    return slice(None), *(slice(max(0, n), max(0, size + min(0, n))) for size, n in pairs)


def _by_transforms(x: Tensor, spatial: Sequence[SpatialAxis], groups: int) -> Tensor:
    """The correlation (g, c, c', δ…) of few channels, in float32 at least."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, -1))
    dims = tuple(range(-len(spatial), 0))
    sizes = [_smooth(a.input_size + (a.kernel_size - 1) * a.dilation) for a in spatial]
    channels = exact.shape[2]
    pairs = list(combinations_with_replacement(range(channels), 2))
    spectrum: Tensor | None = None
    for part in exact.split(max(1, SPECTRUM_LIMIT // (groups * channels * prod(sizes)))):
        values = torch.fft.rfftn(part, sizes, dims)
        powers = torch.stack([_power(values, a, b) for a, b in pairs], 1)
        spectrum = powers if spectrum is None else spectrum.add_(powers)
    assert spectrum is not None
    correlation = torch.fft.irfftn(spectrum, sizes, dims)
    for dim, axis in enumerate(spatial, start=2):
        offsets = torch.arange(1 - axis.kernel_size, axis.kernel_size, device=x.device)
        correlation = correlation.index_select(dim, offsets * axis.dilation % sizes[dim - 2])
    shape = (groups, channels, channels, *correlation.shape[2:])
    full = exact.new_empty(shape)
    for at, (a, b) in enumerate(pairs):
        full[:, a, b] = correlation[:, at]
        if a != b:
            full[:, b, a] = correlation[:, at].flip(dims)
    return full


def _power(spectrum: Tensor, a: int, b: int) -> Tensor:
    """The spectrum (n, g, c, f…) of two channels: Σ_n conj(channel a) · channel b, (g, f…)."""
    left, right = spectrum[:, :, a], spectrum[:, :, b]
    if a == b:
        return torch.view_as_real(left).square().sum((0, -1)).to(left.dtype)
    return (left.conj() * right).sum(0)


def _smooth(size: int) -> int:
    """The next size that Fourier transforms do fast: a product of 2, 3 and 5."""
    rest = size
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return size if rest == 1 else _smooth(size + 1)


def _by_convolution(x: Tensor, spatial: Sequence[SpatialAxis], groups: int) -> Tensor:
    """The correlation (g, c, c', δ…), the gradient of a grouped convolution's weight."""
    channels = x.shape[1] // groups
    dilation = [a.dilation for a in spatial]
    padding = [(a.kernel_size - 1) * a.dilation for a in spatial]
    ones, zeros = [1] * len(spatial), [0] * len(spatial)
    offsets = [2 * a.kernel_size - 1 for a in spatial]
    like = x.new_empty(1).expand(x.shape[1], channels, *offsets)
    arguments = (like, None, ones, padding, dilation, False, zeros, groups, [False, True, False])
    correlation = torch.ops.aten.convolution_backward(x, x, *arguments)[1]
    return correlation.reshape(groups, channels, channels, *offsets)
