"""Both diagonal Kronecker factors of a layer's call, in one pass over its tensors.

With rows that are the windows of the input x (n, c, *pixels), and the output gradient
v (n, d, *positions),

    reduce: A[c, k] = Σ_n (1/O · Σ_o x[n, c, o·stride + k·dilation − padding])²   G[d] = Σ_n (Σ_o v)²
    expand: A[c, k] = Σ_n Σ_o x[n, c, …]²                                        G[d] = Σ_n Σ_o v²

(https://arxiv.org/abs/2311.00636, on the diagonal). The result is one vector: A for each group,
with the number of rows after it if there is a bias; G; the number of rows; that of loss terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tn_kfac.kernels.window_sum import KERNEL_DTYPES, Windows, window_sum_reference

try:
    from tn_kfac.kernels import diagonals_triton
except ImportError:  # no Triton on this machine
    diagonals_triton = None

COUNTERS = 8192
"""How many tiles of channels a launch may have."""
PROGRAMS, TILE, WIDEST, MAX_OFFSETS, MAX_STRIDE = 1024, 4096, 512, 64, 4
"""Programs that a tensor is shared out to; entries of a tile; limits of lines and windows."""


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

    It needs Triton, float32, bfloat16 or float16, at most two pixel axes with few offsets and
    small strides, positions at equal distances in memory, and less than 2³¹ entries a sample.

    Args:
        x: The input, (n, c, *pixels).
        v: The output gradient, (n, d, *positions).
        request: What is wanted.
        counters: `COUNTERS` zeros (int32), for this call alone until it is done; left as zeros.
    """
    if diagonals_triton is None or x.dtype not in KERNEL_DTYPES or v.dtype not in KERNEL_DTYPES:
        return None
    tensors = (x.shape, x.stride(), v.shape, v.stride())
    made = _launch(*tensors, request.axes, request.groups, request.reduce, request.bias)
    if made is None:
        return None
    out = torch.empty(made.size, dtype=torch.float32, device=x.device)
    partial = torch.empty(made.partial, dtype=torch.float32, device=x.device)
    numbers = (made.rows, float(request.terms), float(request.scale), *made.numbers)
    diagonals_triton.kernel[(made.programs,)](
        x, v, out, partial, counters, *numbers, **made.constants
    )
    return out


@dataclass(frozen=True)
class Launch:
    """How the kernel is called for tensors of some shapes and strides."""

    programs: int
    size: int
    partial: int
    rows: float
    numbers: tuple[float, ...]
    constants: dict[str, Any]


class _Axis(NamedTuple):
    """The windows of an axis, as the kernel takes them."""

    size: int = 1
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    last: int = 0


class _Side(NamedTuple):
    """How a tensor is cut: into tiles of channels, and their samples into shares.

    Attributes:
        samples: Parts along the first axis, `distance` entries apart.
        pixels: Pixels of each (of a line, where lines matter), `step` entries apart.
        every: Pixels of all.
        tile: Lines, pixels and channels that are read at once.
        reduce: Whether sums of pixels are squared, or pixels.
    """

    samples: int
    pixels: int
    every: int
    distance: int
    step: int
    tile: tuple[int, int, int]
    tiles: int
    splits: int
    share: int
    reduce: bool


@lru_cache(maxsize=4096)
def _launch(
    x: Sequence[int], x_strides: Sequence[int], v: Sequence[int], v_strides: Sequence[int],
    axes: tuple[Windows, ...], groups: int, reduce: bool, bias: bool,
) -> Launch | None:  # fmt: skip
    """The launch for such tensors, None if the kernel does not handle them."""
    if min(prod(x), prod(v)) == 0 or max(_extent(x, x_strides), _extent(v, v_strides)) >= 2**31:
        return None
    known = [_Axis(a.input_size, a.kernel_size, a.stride, a.padding[0], a.dilation,
                   a.output_size - 1) for a in axes]  # fmt: skip
    plain = all(a.kernel == a.stride == 1 and a.last == a.size - 1 for a in known)
    axis = (_Axis(), _Axis()) if plain else (*[_Axis()] * (2 - len(known)), *known)
    given = _plain(x, x_strides, reduce) if plain else _windowed(x, x_strides, axis, reduce)
    grad = _plain(v, v_strides, reduce)
    if given is None or grad is None or given.tiles + grad.tiles > COUNTERS:
        return None
    channels, offsets, positions = x[1], axis[0].kernel * axis[1].kernel, prod(v[2:])
    line = x_strides[-2] if len(known) > 1 else 0
    numbers = (
        1.0 / positions, channels, channels // groups, axis[0].size, axis[0].last, axis[1].last,
        line, *_numbers(given, x_strides), v[1], *_numbers(grad, v_strides),
    )  # fmt: skip
    return Launch(
        programs=given.tiles * given.splits + grad.tiles * grad.splits,
        size=channels * offsets + groups * bias + v[1] + 2,
        partial=channels * offsets * given.splits + v[1] * grad.splits,
        rows=float(v[0] if reduce else v[0] * positions),
        numbers=numbers,
        constants=_constants(given, grad, axis, plain, groups, bias),
    )


def _numbers(side: _Side, strides: Sequence[int]) -> tuple[int, ...]:
    return (side.samples, side.pixels, side.every, side.distance, strides[1], side.step,
            side.tiles, side.splits, side.share)  # fmt: skip


def _constants(
    given: _Side, grad: _Side, axis: Sequence[_Axis], plain: bool, groups: int, bias: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    first, second = axis
    classes = {(k * first.dilation - first.padding) % first.stride for k in range(first.kernel)}
    kernels = _power(first.kernel * second.kernel)
    windows = {
        f"{name}_{number}": value
        for number, each in ((1, first), (2, second))
        for name, value in zip("KSPD", each[1:5], strict=True)
    }
    return windows | {
        "CLASSES": 0 if plain else sum(1 << c for c in classes),
        "KERNELS": kernels, "BIAS": int(bias), "GROUPS": _power(groups),
        "REDUCE_X": given.reduce, "REDUCE_V": grad.reduce,
        "X_H": given.tile[0], "X_W": given.tile[1], "X_C": given.tile[2],
        "V_P": grad.tile[1], "V_C": grad.tile[2],
        "X_ONCE": max(1, TILE // (kernels * given.tile[2])),
        "V_ONCE": max(1, TILE // grad.tile[2]),
        "num_warps": 8 if max(prod(given.tile), prod(grad.tile)) > TILE else 4,
    }  # fmt: skip


def _plain(shape: Sequence[int], strides: Sequence[int], reduce: bool) -> _Side | None:
    """A tensor whose rows are its pixels; None where these are not at equal distances."""
    samples, channels, pixels = *shape[:2], prod(shape[2:])
    step = _step(shape[2:], strides[2:])
    if step is None:
        return None
    distance, every = strides[0], samples * pixels
    block = min(_power(channels), 64 if strides[1] == 1 else max(16, TILE // _power(pixels)))
    tiles = -(-channels // block)
    if pixels == 1 or (not reduce and distance == pixels * step):  # one row: it is cut anew
        step = distance if pixels == 1 else step
        reduce = False
        pixels = -(-every * tiles // PROGRAMS)
        pixels = min(every, max(pixels, min(_power(every), TILE // block)))
        samples, distance = -(-every // pixels), pixels * step
    tile = (1, min(_power(pixels), TILE // block), block)
    splits, share = _shares(samples, tiles)
    return _Side(samples, pixels, every, distance, step, tile, tiles, splits, share, reduce)


def _windowed(
    shape: Sequence[int], strides: Sequence[int], axis: Sequence[_Axis], reduce: bool
) -> _Side | None:
    """A tensor whose rows are windows; None if there are too many offsets or classes of lines."""
    first, second = axis
    width = _power(second.size)
    if len(shape) > 4 or width > WIDEST or first.kernel * second.kernel > MAX_OFFSETS:
        return None
    if max(first.stride, second.stride) > MAX_STRIDE:
        return None
    entries = TILE if width <= 64 else 2 * TILE
    block = min(_power(shape[1]), max(4, entries // width), 64)
    lines = min(entries // (width * block), _power(-(-first.size // first.stride)), 16)
    tiles = -(-shape[1] // block)
    splits, share = _shares(shape[0], tiles)
    return _Side(
        shape[0], second.size, 0, strides[0], strides[-1], (max(1, lines), width, block), tiles,
        splits, share, reduce,
    )  # fmt: skip


def _shares(samples: int, tiles: int) -> tuple[int, int]:
    """Into how many shares samples are cut, and how large each is."""
    share = -(-samples // min(samples, max(1, PROGRAMS // tiles)))
    return -(-samples // share), share


def _step(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The distance of neighbours in a tensor whose entries are at equal ones, else None."""
    known = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size > 1]
    for (_, outer), (size, inner) in zip(known, known[1:], strict=False):
        if outer != size * inner:
            return None
    return known[-1][1] if known else 1


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How far the entries of one sample lie apart."""
    return sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
