"""The Triton kernel of `window_sum`."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from tn_kfac.kernels.window_sum import Windows

TILE = 4096
"""Pixels that one program reads."""
MAX_WIDTH, MAX_OFFSETS = 2048, 64
"""The kernel reads whole lines and unrolls over offsets: no more of either."""


@triton.jit
def _met(pixel, offset, PADDING: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, last):
    """Whether a window (up to the last) meets the pixel at the offset."""
    start = pixel + PADDING - offset * DILATION
    window = start // STRIDE
    return (start >= 0) & (window * STRIDE == start) & (window <= last)


@triton.jit
def _kernel(
    x, y, rows, height, width, last_1, last_2,
    STRIDE_1: tl.constexpr, PADDING_1: tl.constexpr, DILATION_1: tl.constexpr,
    STRIDE_2: tl.constexpr, PADDING_2: tl.constexpr, DILATION_2: tl.constexpr,
    K_1: tl.constexpr, K_2: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (b, l): block b of rows, block l of lines, into y[l, rows, kernels]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_1 = tl.program_id(1) * LINES + tl.arange(0, LINES)
    i_2 = tl.arange(0, WIDTH)
    line = row[:, None, None] * height + i_1[None, :, None]
    inside = (row < rows)[:, None, None] & (i_1 < height)[None, :, None] & (i_2 < width)
    pixels = tl.load(x + line * width + i_2[None, None, :], mask=inside, other=0.0)
    pixels = pixels.to(tl.float32)
    place = (tl.program_id(1).to(tl.int64) * rows + row) * (K_1 * K_2)
    for k_2 in tl.static_range(K_2):
        met_2 = _met(i_2, k_2, PADDING_2, STRIDE_2, DILATION_2, last_2)
        lines = tl.sum(tl.where(met_2[None, None, :], pixels, 0.0), axis=2)
        for k_1 in tl.static_range(K_1):
            met_1 = _met(i_1, k_1, PADDING_1, STRIDE_1, DILATION_1, last_1)
            total = tl.sum(tl.where(met_1[None, :], lines, 0.0), axis=1)
            tl.store(y + place + (k_1 * K_2 + k_2), total, mask=row < rows)


def fits(axes: Sequence[Windows]) -> bool:
    """Whether the kernel handles these windows."""
    offsets = 1
    for axis in axes:
        offsets *= axis.kernel_size
    return len(axes) <= 2 and axes[-1].input_size <= MAX_WIDTH and offsets <= MAX_OFFSETS


def window_sum(x: Tensor, axes: Sequence[Windows]) -> Tensor:
    """Window sums of a contiguous x (rows, *input) over one or two axes."""
    rows, last = x.shape[0], axes[-1]
    height, kernel, windows, stride, padding, dilation = (1, 1, 1, 1, 0, 1)
    if len(axes) == 2:  # a missing first axis is one pixel, one offset and one window
        first = axes[0]
        height, kernel, windows = first.input_size, first.kernel_size, first.output_size
        stride, padding, dilation = first.stride, first.padding[0], first.dilation
    width = triton.next_power_of_2(last.input_size)
    lines = min(triton.next_power_of_2(height), max(1, TILE // width))
    block = max(1, TILE // (lines * width))
    parts = triton.cdiv(height, lines)
    kernels = kernel * last.kernel_size
    sums = torch.empty(parts, rows, kernels, dtype=torch.float32, device=x.device)
    _kernel[(triton.cdiv(rows, block), parts)](
        x, sums, rows, height, last.input_size, windows - 1, last.output_size - 1,
        STRIDE_1=stride, PADDING_1=padding, DILATION_1=dilation,
        STRIDE_2=last.stride, PADDING_2=last.padding[0], DILATION_2=last.dilation,
        K_1=kernel, K_2=last.kernel_size, ROWS=block, LINES=lines, WIDTH=width,
    )  # fmt: skip
    total = sums[0] if parts == 1 else sums.sum(0)
    return total.to(x.dtype).reshape(rows, *(axis.kernel_size for axis in axes))
