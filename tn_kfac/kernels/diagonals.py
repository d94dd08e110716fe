"""Both diagonal Kronecker factors of a layer's call, in one pass over its tensors.

With rows that are the windows of the input x (n, c, *pixels), and the output gradient
v (n, d, *positions),

    reduce: A[c, k] = Σ_n (1/O · Σ_o x[n, c, i])²    G[d] = Σ_n (Σ_o v[n, d, o])²
    expand: A[c, k] = Σ_n Σ_o x[n, c, i]²            G[d] = Σ_n Σ_o v[n, d, o]²

with i = o·stride + k·dilation − padding

(https://arxiv.org/abs/2311.00636, on the diagonal). The result is one vector: A for each group,
with the number of rows after it if there is a bias; G; the number of rows; that of loss terms.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tn_kfac.kernels.diagonals_launch import Launch, planned
from tn_kfac.kernels.window_sum import Windows, window_sum_reference

try:
    from tn_kfac.kernels import diagonals_triton
except ImportError:  # no Triton on this machine
    diagonals_triton = None

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""How many bfloat16 numbers have an entry as their sum; its square needs twice as many, or three
for what float32 holds of it."""


class Request(NamedTuple):
    """What is wanted of a call.

    Attributes:
        axes: The windows along each pixel axis; none: every pixel is a row.
        groups: Channel groups.
        reduce: KFAC-reduce or KFAC-expand.
        bias: Whether there is a bias.
        terms: The number of loss terms.
        scale: A factor of G.
    """

    axes: tuple[Windows, ...]
    groups: int
    reduce: bool
    bias: bool
    terms: float
    scale: float = 1.0


def diagonals_reference(x: Tensor, v: Tensor, request: Request, dtype: torch.dtype) -> Tensor:
    """The vector by plain torch operations."""
    (n, c, *pixels), positions, axes = x.shape, prod(v.shape[2:]), request.axes
    x, v = x.to(dtype).reshape(n * c, *pixels), v.to(dtype).reshape(*v.shape[:2], positions)
    values = x if request.reduce else x.square()
    sums = window_sum_reference(values, axes) if axes else values.reshape(n * c, -1).sum(1)
    sums = sums.reshape(n, c, prod(axis.kernel_size for axis in axes))
    if request.reduce:
        A, G = (sums / max(1, positions)).square().sum(0), v.sum(2).square().sum(0)
    else:
        A, G = sums.sum(0), v.square().sum((0, 2))
    rows = float(n if request.reduce else n * positions)
    A = A.reshape(request.groups, -1)
    if request.bias:
        A = torch.cat([A, A.new_full((request.groups, 1), rows)], dim=1)
    return torch.cat([A.flatten(), G * request.scale, A.new_tensor([rows, request.terms])])


def diagonals(x: Tensor, v: Tensor, request: Request, counters: Tensor) -> Tensor | None:
    """The vector in float32 by the kernel; None where that does not run.

    See `prepared` and `Call`.
    """
    call = prepared(x, v, request)
    return None if call is None else call(x, v, counters)


def prepared(x: Tensor, v: Tensor, request: Request) -> Call | None:
    """The kernel's call for tensors of these shapes, strides, dtypes and device.

    It needs Triton, float32, bfloat16 or float16, at most two pixel axes with 16 offsets each,
    positions at equal distances in memory, and less than 2³¹ entries a sample.

    Args:
        x: The input, (n, c, *pixels).
        v: The output gradient, (n, d, *positions).
        request: What is wanted.
    """
    if diagonals_triton is None or x.dtype not in PARTS or v.dtype not in PARTS:
        return None
    tensors = (x.shape, x.stride(), v.shape, v.stride())
    made = planned(*tensors, request.axes, request.groups, request.reduce, request.bias,
                   (PARTS[x.dtype], PARTS[v.dtype]))  # fmt: skip
    return None if made is None else Call(made, request, x.device)


class Call:
    """A call of the kernel, of which only the tensors are missing."""

    def __init__(self, made: Launch, request: Request, device: torch.device) -> None:
        assert diagonals_triton is not None
        self._size, self._parts = made.size, made.parts
        self._empty = torch.empty(0, dtype=torch.float32, device=device).new_empty
        self._kernel = diagonals_triton.prepared(made.programs, made.constants)
        self._numbers = (made.rows, float(request.terms), float(request.scale), *made.numbers)

    def __call__(self, x: Tensor, v: Tensor, counters: Tensor) -> Tensor:
        """The vector.

        Args:
            x: The input.
            v: The output gradient.
            counters: `COUNTERS` zeros (int32), for this call alone until it is done; left as
                zeros.
        """
        out, parts = self._empty(self._size), self._empty(self._parts)
        self._kernel((x, v, out, parts, counters), self._numbers)
        return out
