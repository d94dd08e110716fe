"""The Triton kernel of `window_sum`."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from tn_kfac.kernels.window_sum import Windows

BLOCK_ROWS = 32
BLOCK_PIXELS = 64
PROGRAMS = 1024
"""Pixels are split over programs until there are about so many."""


@triton.jit
def _met(pixel, offset, PADDING: Any, STRIDE: Any, DILATION: Any, outputs):
    """Whether a window meets the pixel at the offset."""
    start = pixel + PADDING - offset * DILATION
    window = start // STRIDE
    return (start >= 0) & (window * STRIDE == start) & (window < outputs)


@triton.jit
def _kernel(
    x, y, rows, width, pixels, outputs_1, outputs_2, span,
    STRIDE_1: tl.constexpr, PADDING_1: tl.constexpr, DILATION_1: tl.constexpr,
    STRIDE_2: tl.constexpr, PADDING_2: tl.constexpr, DILATION_2: tl.constexpr,
    K_2: tl.constexpr, KERNELS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Program (b, s): rows of block b, pixels of span s, into y[s, rows, kernels]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offset = tl.arange(0, PADDED)
    sums = tl.zeros((ROWS, PADDED), dtype=tl.float32)
    base = row.to(tl.int64)[:, None] * pixels
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, pixels), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        inside = (row[:, None] < rows) & (pixel[None, :] < pixels)
        block = tl.load(x + base + pixel[None, :], mask=inside, other=0.0)
        i_1, i_2 = pixel // width, pixel % width
        k_1, k_2 = offset // K_2, offset % K_2
        met_1 = _met(i_1[:, None], k_1[None, :], PADDING_1, STRIDE_1, DILATION_1, outputs_1)
        met_2 = _met(i_2[:, None], k_2[None, :], PADDING_2, STRIDE_2, DILATION_2, outputs_2)
        counts = (met_1 & met_2).to(block.dtype)
        sums += tl.dot(block, counts, input_precision="ieee")
    place = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * KERNELS + offset[None, :]
    tl.store(y + place, sums, mask=(row[:, None] < rows) & (offset[None, :] < KERNELS))


def window_sum(x: Tensor, axes: Sequence[Windows]) -> Tensor:
    """Window sums of a contiguous x (rows, *input) over one or two axes."""
    rows, pixels = x.shape[0], x[0].numel()
    last = axes[-1]
    # a missing first axis is one pixel, one offset and one window
    first = axes[0] if len(axes) == 2 else None
    outputs, stride, padding, dilation = (
        (first.output_size, first.stride, first.padding[0], first.dilation)
        if first is not None
        else (1, 1, 0, 1)
    )
    kernels = last.kernel_size * (first.kernel_size if first is not None else 1)
    blocks = triton.cdiv(rows, BLOCK_ROWS)
    splits = max(1, min(triton.cdiv(pixels, 8 * BLOCK_PIXELS), PROGRAMS // blocks))
    span = triton.cdiv(triton.cdiv(pixels, splits), BLOCK_PIXELS) * BLOCK_PIXELS
    splits = triton.cdiv(pixels, span)
    sums = torch.empty(splits, rows, kernels, dtype=torch.float32, device=x.device)
    _kernel[(blocks, splits)](
        x, sums, rows, last.input_size, pixels, outputs, last.output_size, span,
        STRIDE_1=stride, PADDING_1=padding, DILATION_1=dilation,
        STRIDE_2=last.stride, PADDING_2=last.padding[0], DILATION_2=last.dilation,
        K_2=last.kernel_size, KERNELS=kernels, PADDED=max(16, triton.next_power_of_2(kernels)),
        ROWS=BLOCK_ROWS, PIXELS=BLOCK_PIXELS,
    )  # fmt: skip
    total = sums[0] if splits == 1 else sums.sum(0)
    return total.to(x.dtype).reshape(rows, *(axis.kernel_size for axis in axes))
