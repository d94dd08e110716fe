"""Sums of a tensor over the windows of each spatial axis.

    y[r, k…] = Σ_i x[r, i…] Π_axes #{windows that meet pixel i at offset k}

One pass over x: on a GPU a Triton kernel sums each line over the windows that meet it, and
then the lines; which those are it computes from indices, so that nothing but x is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

try:
    from tn_kfac.kernels import window_sum_triton
except ImportError:  # no Triton on this machine
    window_sum_triton = None

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Windows(Protocol):
    """The windows along one axis: pixel = window·stride + offset·dilation − padding[0]."""

    @property
    def input_size(self) -> int:
        """Number of pixels."""
        ...

    @property
    def kernel_size(self) -> int:
        """Number of offsets."""
        ...

    @property
    def stride(self) -> int:
        """Pixels between windows."""
        ...

    @property
    def padding(self) -> tuple[int, int]:
        """Pixels before the first one and after the last."""
        ...

    @property
    def dilation(self) -> int:
        """Pixels between offsets."""
        ...

    @property
    def output_size(self) -> int:
        """Number of windows."""
        ...


@lru_cache(maxsize=256)
def window_counts(axis: Windows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How many windows meet pixel i at offset k, (kernel, input): 0 or 1."""
    kernel = torch.arange(axis.kernel_size, device=device)[:, None]
    pixel = torch.arange(axis.input_size, device=device)[None, :]
    start = pixel + axis.padding[0] - kernel * axis.dilation
    window = torch.div(start, axis.stride, rounding_mode="floor")
    met = (start % axis.stride == 0) & (window >= 0) & (window < axis.output_size)
    return met.to(dtype)


def window_sum_reference(x: Tensor, axes: Sequence[Windows]) -> Tensor:
    """The window sums axis by axis, differentiable: of tiles, or by a matrix product."""
    tiled = _tiled(tuple(axes))
    if tiled is not None:
        x = x.reshape(x.shape[0], *tiled)
        for dim in range(len(tiled) - 1, 0, -2):
            x = x.sum(dim)
        return x
    for dim in range(len(axes), 0, -1):
        axis = axes[dim - 1]
        pixels, counts = x.movedim(dim, -1), window_counts(axis, x.dtype, x.device)
        summed = counts @ pixels.reshape(-1, axis.input_size).T  # wide: faster than tall
        x = summed.reshape(axis.kernel_size, *pixels.shape[:-1]).movedim(0, dim)
    return x


@lru_cache(maxsize=4096)
def _tiled(axes: tuple[Windows, ...]) -> tuple[int, ...] | None:
    """The sizes (o, k) of each axis, if windows are disjoint and cover all pixels: i = o·K + k."""
    sizes: tuple[int, ...] = ()
    for axis in axes:
        plain = axis.padding[0] == 0 and (axis.dilation == 1 or axis.kernel_size == 1)
        covered = axis.output_size * axis.kernel_size == axis.input_size
        if not (plain and covered and axis.stride == axis.kernel_size):
            return None
        sizes += (axis.output_size, axis.kernel_size)
    return sizes


def window_sum(x: Tensor, axes: Sequence[Windows]) -> Tensor:
    """The window sums of x (rows, *input), shape (rows, *kernel), accumulated in float32.

    By the kernel where it runs, by the reference elsewhere (and for other dtypes, three
    axes, large kernels, or gradients).
    """
    if window_sum_triton is None or not x.is_cuda or not window_sum_triton.fits(axes):
        return window_sum_reference(x, axes)
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if x.dtype not in KERNEL_DTYPES or x.numel() == 0 or wants_gradient:
        return window_sum_reference(x, axes)
    return window_sum_triton.window_sum(x.contiguous(), axes)
