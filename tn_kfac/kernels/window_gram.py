"""The gram of all windows of a tensor, which nobody unfolds: dense KFAC-expand on a GPU.

    A[(c, k), (c', k')] = Σ_n Σ_o x[n, c, o·stride + k·dilation − padding] x[n, c', o·… + k'·…]

A matrix product by tensor cores, whose operands are read through windows: each is one line of
channels of one pixel. Only tiles on and above the diagonal are formed. That is three times the
products of the autocorrelation (`tensor_network.primitives.correlation`) for a kernel of 3 × 3, but
two launches instead of a hundred, no copies and no border terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tn_kfac.kernels.available import available
from tn_kfac.kernels.products import HALF
from tn_kfac.kernels.window_sum import Windows

try:
    from tn_kfac.kernels import window_gram_triton
except ImportError:  # no Triton on this machine
    window_gram_triton = None

MOST_PRODUCTS = 6e11
"""With more of them in stride 1, the autocorrelation is faster (3 ms on an H200)."""
ALIGNED = 8
"""Channels of a group are a multiple of that: 16 bytes, which are read at once."""


class Geometry(NamedTuple):
    """Windows of two axes of pixels, which are all inside.

    Attributes:
        groups: Channel groups.
        channels: Of one group.
        kernel: Offsets of each axis.
        stride: Pixels between windows.
        dilation: Pixels between offsets.
        positions: Windows of a sample.
        width: Windows along the second axis.
    """

    groups: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    positions: int
    width: int

    @property
    def columns(self) -> int:
        """Entries of a window."""
        return self.channels * prod(self.kernel)


def runs_on(x: Tensor) -> bool:
    """Whether the kernel may run on tensors of this device and dtype."""
    return available(x.device) and x.dtype in HALF


def window_gram(x: Tensor, axes: Sequence[Windows], groups: int) -> Tensor | None:
    """The gram in float32, (groups, d, d) with d = c · Π K; None where the kernel does not run.

    It needs Triton, half precision, one or two axes of pixels with more than one offset, groups of
    a multiple of eight channels, and less than 2³¹ entries a sample (and rows in all). Large calls
    of stride 1 are left to the autocorrelation. Products are exact; of their float32 sums, tensor
    cores cut the last digits off (4e-5 of 25,000 squares: `kernels.products`).

    Args:
        x: (n, groups · c, *pixels).
        axes: The windows along each axis of pixels.
        groups: Channel groups.
    """
    if window_gram_triton is None or not runs_on(x):
        return None
    if not (1 <= len(axes) <= 2) or (x.shape[1] // groups) % ALIGNED or x.numel() == 0:
        return None
    geometry = _geometry(x.shape[1] // groups, axes, groups)
    rows, columns = x.shape[0] * geometry.positions, geometry.columns
    large = groups * rows * columns**2 > MOST_PRODUCTS
    if columns == geometry.channels or (large and geometry.stride == (1, 1)):
        return None
    if max(4 * x[0].numel(), rows, columns**2) >= 2**31:
        return None
    x = _inside(x, axes)
    return window_gram_triton.window_gram(x if len(axes) == 2 else x[:, None], geometry)


def _geometry(channels: int, axes: Sequence[Windows], groups: int) -> Geometry:
    first, last = axes[0] if len(axes) == 2 else None, axes[-1]
    return Geometry(
        groups=groups,
        channels=channels,
        kernel=(first.kernel_size if first else 1, last.kernel_size),
        stride=(first.stride if first else 1, last.stride),
        dilation=(first.dilation if first else 1, last.dilation),
        positions=prod(axis.output_size for axis in axes),
        width=last.output_size,
    )


def window_gram_reference(
    x: Tensor, axes: Sequence[Windows], groups: int, dtype: torch.dtype
) -> Tensor:
    """The same by unfolding, in any dtype, for any number of axes."""
    rows = x.to(dtype)
    for dim, axis in enumerate(axes, 2):  # (n, g·c, o…, remaining pixels…, k…)
        reach = (axis.kernel_size - 1) * axis.dilation + 1
        rows = F.pad(rows.movedim(dim, -1), axis.padding).unfold(-1, reach, axis.stride)
        rows = rows[..., : axis.output_size, :: axis.dilation].movedim(-2, dim)
    rows = rows.unflatten(1, (groups, -1)).movedim((1, 2), (0, 2 + len(axes)))
    rows = rows.reshape(groups, -1, x.shape[1] // groups * prod(a.kernel_size for a in axes))
    return rows.mT @ rows


def _inside(x: Tensor, axes: Sequence[Windows]) -> Tensor:
    """x with channels last and with the padding that its windows reach, (n, *pixels, channels)."""
    reached = [(a.output_size - 1) * a.stride + (a.kernel_size - 1) * a.dilation + 1 for a in axes]
    last = x.movedim(1, -1)
    within = all(
        a.padding[0] == 0 and end <= a.input_size for a, end in zip(axes, reached, strict=True)
    )
    if within and last.stride(-1) == 1 and all(s % ALIGNED == 0 for s in last.stride()[:-1]):
        return last
    padded = x.new_zeros(x.shape[0], *reached, x.shape[1])
    to, of = [slice(None)], [slice(None)]
    for axis, end in zip(axes, reached, strict=True):
        count = max(0, min(axis.input_size, end - axis.padding[0]))
        to.append(slice(axis.padding[0], axis.padding[0] + count))
        of.append(slice(0, count))
    padded[tuple(to)] = last[tuple(of)]
    return padded
