"""The Triton kernel of `window_sum`."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from tn_kfac.kernels.window_sum import Windows

TILE, WIDTH, TILES = 1024, 64, 8
"""Pixels of a tile, at most so many of them side by side, and tiles that a program reads.

A program is one warp, so that sums along a line stay in its registers (measured: with four
warps 1.4 to 4 times slower)."""
MAX_CLASSES, MAX_OFFSETS = 4, 64
"""Lines are sorted by their class modulo strides up to the first; the kernel unrolls over
offsets, of which there may be so many."""


@triton.jit
def _met(pixel, offset, PADDING: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, last):
    """Whether a window (up to the last) meets the pixel at the offset."""
    start = pixel + PADDING - offset * DILATION
    window = start // STRIDE
    return (start >= 0) & (window * STRIDE == start) & (window <= last)


@triton.jit
def _line_sums(
    columns, pixels, i_1, low, high, residue: tl.constexpr, last,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    K: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Add a tile's lines, from `low` to `high`, to the columns (k, row, pixel) of the first axis.

    Where lines are sorted by class and every window exists, all meet the same offsets.
    """
    kernel = tl.arange(0, columns.shape[0])
    everywhere = (low + PADDING >= (K - 1) * DILATION) & (high + PADDING <= last * STRIDE)
    if CLASSES == STRIDE and everywhere:
        start = residue + PADDING + K * DILATION * STRIDE - kernel * DILATION  # not negative
        lines = tl.sum(pixels, axis=1)
        columns += tl.where((start % STRIDE == 0)[:, None, None], lines[None], 0.0)
    else:
        for k in tl.static_range(K):
            if CLASSES != STRIDE or (residue + PADDING - k * DILATION) % STRIDE == 0:
                met = _met(i_1, k, PADDING, STRIDE, DILATION, last)
                lines = tl.sum(tl.where(met[None, :, None], pixels, 0.0), axis=1)
                columns += tl.where((kernel == k)[:, None, None], lines[None], 0.0)
    return columns


@triton.jit
def _kernel(
    x, y, rows, height, width, last_1, last_2, blocks_2,
    STRIDE_1: tl.constexpr, PADDING_1: tl.constexpr, DILATION_1: tl.constexpr,
    STRIDE_2: tl.constexpr, PADDING_2: tl.constexpr, DILATION_2: tl.constexpr,
    K_1: tl.constexpr, K_2: tl.constexpr, K_1_PADDED: tl.constexpr, CLASSES: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (b, l): block b of rows, block l of lines and pixels, into y[l, rows, kernels].

    First lines are summed, for each offset of the first axis, then the pixels of these sums.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    i_2 = (block % blocks_2) * WIDTH + tl.arange(0, WIDTH)
    first = (block // blocks_2) * (LINES * TILES * CLASSES)
    columns = tl.zeros((K_1_PADDED, ROWS, WIDTH), tl.float32)
    for residue in tl.static_range(CLASSES):
        for tile in range(TILES):
            low = first + residue + tile * (LINES * CLASSES)
            i_1 = low + CLASSES * tl.arange(0, LINES)
            line = row[:, None, None] * height + i_1[None, :, None]
            inside = (row < rows)[:, None, None] & (i_1 < height)[None, :, None] & (i_2 < width)
            pixels = tl.load(x + line * width + i_2[None, None, :], mask=inside, other=0.0)
            columns = _line_sums(
                columns, pixels.to(tl.float32), i_1, low, low + CLASSES * (LINES - 1), residue,
                last_1, STRIDE_1, PADDING_1, DILATION_1, K_1, CLASSES,
            )  # fmt: skip
    k_1 = tl.arange(0, K_1_PADDED)[:, None]
    place = (block.to(tl.int64) * rows + row[None, :]) * (K_1 * K_2) + k_1 * K_2
    for k_2 in tl.static_range(K_2):
        met_2 = _met(i_2, k_2, PADDING_2, STRIDE_2, DILATION_2, last_2)
        total = tl.sum(tl.where(met_2[None, None, :], columns, 0.0), axis=2)
        tl.store(y + place + k_2, total, mask=(k_1 < K_1) & (row < rows)[None, :])


def fits(axes: Sequence[Windows]) -> bool:
    """Whether the kernel handles these windows."""
    offsets = 1
    for axis in axes:
        offsets *= axis.kernel_size
    return len(axes) <= 2 and offsets <= MAX_OFFSETS


def window_sum(x: Tensor, axes: Sequence[Windows]) -> Tensor:
    """Window sums of a contiguous x (rows, *input) over one or two axes."""
    rows, last = x.shape[0], axes[-1]
    height, kernel, windows, stride, padding, dilation = (1, 1, 1, 1, 0, 1)
    if len(axes) == 2:  # a missing first axis is one pixel, one offset and one window
        first = axes[0]
        height, kernel, windows = first.input_size, first.kernel_size, first.output_size
        stride, padding, dilation = first.stride, first.padding[0], first.dilation
    classes = stride if stride <= MAX_CLASSES else 1
    width = min(WIDTH, triton.next_power_of_2(last.input_size))
    lines = min(TILE // width, triton.next_power_of_2(triton.cdiv(height, classes)))
    tiles = max(1, min(TILES // classes, triton.cdiv(height, lines * classes)))
    block = TILE // (lines * width)
    blocks_2 = triton.cdiv(last.input_size, width)
    parts = triton.cdiv(height, lines * tiles * classes) * blocks_2
    kernels = kernel * last.kernel_size
    sums = torch.empty(parts, rows, kernels, dtype=torch.float32, device=x.device)
    _kernel[(triton.cdiv(rows, block), parts)](
        x, sums, rows, height, last.input_size, windows - 1, last.output_size - 1, blocks_2,
        STRIDE_1=stride, PADDING_1=padding, DILATION_1=dilation,
        STRIDE_2=last.stride, PADDING_2=last.padding[0], DILATION_2=last.dilation,
        K_1=kernel, K_2=last.kernel_size, K_1_PADDED=triton.next_power_of_2(kernel),
        CLASSES=classes, ROWS=block, LINES=lines, WIDTH=width, TILES=tiles, num_warps=1,
    )  # fmt: skip
    total = sums[0] if parts == 1 else sums.sum(0)
    return total.to(x.dtype).reshape(rows, *(axis.kernel_size for axis in axes))
