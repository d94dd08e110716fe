"""Sums of a tensor over the windows of each spatial axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Windows(Protocol):
    """The windows along one axis: pixel = window·stride + offset·dilation − padding[0]."""

    input_size: int
    kernel_size: int
    stride: int
    padding: tuple[int, int]
    dilation: int

    @property
    def output_size(self) -> int:
        """Number of windows."""
        ...


def window_counts(axis: Windows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How many windows meet pixel i at offset k, (kernel, input)."""
    kernel = torch.arange(axis.kernel_size, device=device)[:, None]
    pixel = torch.arange(axis.input_size, device=device)[None, :]
    start = pixel + axis.padding[0] - kernel * axis.dilation
    window = torch.div(start, axis.stride, rounding_mode="floor")
    met = (start % axis.stride == 0) & (window >= 0) & (window < axis.output_size)
    return met.to(dtype)


def window_sum_reference(x: Tensor, axes: Sequence[Windows]) -> Tensor:
    """Σ_i x[r, i…] Π_axes #{windows that meet i at offset k}; x (rows, *in) to (rows, *k)."""
    for axis in reversed(axes):
        counts = window_counts(axis, x.dtype, x.device)
        x = torch.tensordot(x, counts, dims=([len(axes)], [1])).movedim(-1, 1)
    return x


def window_sum(x: Tensor, axes: Sequence[Windows]) -> Tensor:
    """The window sums of x (rows, *input), shape (rows, *kernel)."""
    return window_sum_reference(x, axes)
