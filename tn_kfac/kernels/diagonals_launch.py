"""How the kernel of `diagonals` is launched: tensors cut into tiles of channels, shared out.

Symbols alone: shapes and strides in, numbers and constants of the kernel out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

from tn_kfac.kernels.window_sum import Windows

COUNTERS = 8192
"""How many tiles of channels a launch may have."""
PROGRAMS, TILE, LINE, MAX_KERNEL = 1024, 8192, 128, 16
"""Programs that a tensor is shared out to, entries of a tile, pixels of a line that are read at
once; the most offsets of an axis. Chosen by measuring on an H200."""


@dataclass(frozen=True)
class Launch:
    """How the kernel is called for tensors of some shapes and strides."""

    programs: int
    size: int
    parts: int
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
        samples: Parts along the first axis, of `height` lines of `width` pixels each.
        lines: How many of them are read.
        limit: Pixels there are, of which `passed` are in each sample before.
        steps: Distances of samples, channels, lines and pixels in memory.
        block: Channels of a tile.
        at_once: Lines that are read at once.
        reduce: Whether sums of pixels are squared, or pixels.
    """

    samples: int
    lines: int
    height: int
    width: int
    limit: int
    passed: int
    steps: tuple[int, int, int, int]
    block: int
    at_once: int
    reduce: bool

    def shares(self, channels: int) -> tuple[int, int, int]:
        """Tiles, shares of each, and samples of a share."""
        tiles = -(-channels // self.block)
        share = -(-self.samples // min(self.samples, max(1, PROGRAMS // tiles)))
        return tiles, -(-self.samples // share), share


@lru_cache(maxsize=4096)
def planned(
    x: Sequence[int], x_strides: Sequence[int], v: Sequence[int], v_strides: Sequence[int],
    axes: tuple[Windows, ...], groups: int, reduce: bool, bias: bool, wide: tuple[int, int],
) -> Launch | None:  # fmt: skip
    """The launch for such tensors, None if the kernel does not handle them.

    `wide`: how many bfloat16 parts an entry of x, and of v, is cut into.
    """
    if min(prod(x), prod(v)) == 0 or max(_extent(x, x_strides), _extent(v, v_strides)) >= 2**31:
        return None
    known = [_Axis(a.input_size, a.kernel_size, a.stride, a.padding[0], a.dilation,
                   a.output_size - 1) for a in axes]  # fmt: skip
    plain = all(a.kernel == a.stride == 1 and a.last == a.size - 1 for a in known)
    entries = [TILE // 2 if parts == 3 else TILE for parts in wide]
    cut = _plain if plain else partial(_windowed, axes=known)
    given = cut(x, x_strides, reduce, entries[0])
    grad = _plain(v, v_strides, reduce, entries[1])
    if given is None or grad is None:
        return None
    first, second = (_Axis(), _Axis()) if plain else [_Axis(), *known][-2:]
    last = (given.lines - 1, given.width - 1) if plain else (first.last, second.last)
    channels, outputs = x[1], v[1]
    x_shares, v_shares = given.shares(channels), grad.shares(outputs)
    if x_shares[0] + v_shares[0] > COUNTERS:
        return None
    offsets, positions = first.kernel * second.kernel, prod(v[2:])
    numbers = (
        1.0 / positions, channels, channels // groups, *last, *given[:6], *given.steps, *x_shares,
        outputs, *grad[:6], *grad.steps, *v_shares,
    )  # fmt: skip
    return Launch(
        programs=prod(x_shares[:2]) + prod(v_shares[:2]),
        size=channels * offsets + groups * bias + outputs + 2,
        parts=channels * offsets * x_shares[1] + outputs * v_shares[1],
        rows=float(v[0] if reduce else v[0] * positions),
        numbers=numbers,
        constants=_constants(given, grad, first, second, groups, bias, wide),
    )


def _constants(
    given: _Side, grad: _Side, first: _Axis, second: _Axis, groups: int, bias: bool,
    wide: tuple[int, int],
) -> dict[str, Any]:  # fmt: skip
    """What the kernel is compiled for."""
    block = min(1024, _power(given.block * first.kernel * second.kernel))
    windows = {
        f"{name}_{number}": value
        for number, axis in ((1, first), (2, second))
        for name, value in zip("KSPD", axis[1:5], strict=True)
    }
    return windows | {
        "BIAS": int(bias), "GROUPS": _power(groups), "K": _power(first.kernel),
        "REDUCE": given.reduce, "PARTS": wide[0] if given.reduce else min(3, 2 * wide[0]),
        "V_REDUCE": grad.reduce, "V_PARTS": wide[1] if grad.reduce else min(3, 2 * wide[1]),
        "WIDTH": min(LINE, max(16, _power(given.width))), "LINES": given.at_once,
        "V_WIDTH": max(16, _power(grad.width)), "V_LINES": grad.at_once,
        "CHANNELS": given.block, "V_CHANNELS": grad.block,
        "BLOCK": block, "AT_ONCE": TILE // block, "V_AT_ONCE": TILE // grad.block,
    }  # fmt: skip


def _plain(
    shape: Sequence[int], strides: Sequence[int], reduce: bool, entries: int
) -> _Side | None:
    """A tensor whose rows are its pixels; None where these are not at equal distances."""
    samples, channels, pixels = *shape[:2], prod(shape[2:])
    step = _step(shape[2:], strides[2:])
    if step is None or samples * pixels >= 2**31:
        return None
    block, at_once = _tile(entries // LINE, channels)
    limit, passed, distance = pixels, 0, strides[0]
    if pixels == 1 or (not reduce and distance == pixels * step):  # one row: it is cut anew
        step, reduce, limit = distance if pixels == 1 else step, False, samples * pixels
        part = -(-limit * -(-channels // block) // PROGRAMS)
        passed = pixels = min(limit, -(-part // LINE) * LINE)
        samples, distance = -(-limit // pixels), pixels * step
    width = min(pixels, LINE)
    steps = (distance, strides[1], width * step, step)
    lines = -(-pixels // width)
    return _Side(samples, lines, lines, width, limit, passed, steps, block, at_once, reduce)


def _windowed(
    shape: Sequence[int],
    strides: Sequence[int],
    reduce: bool,
    entries: int,
    axes: Sequence[_Axis],
) -> _Side | None:
    """A tensor whose rows are windows; None if there are too many axes, offsets or pixels."""
    first, second = [_Axis(), *axes][-2:]
    if len(axes) > 2 or max(first.kernel, second.kernel) > MAX_KERNEL:
        return None
    block, at_once = _tile(
        min(entries // min(LINE, _power(second.size)), 256 // _power(first.kernel)), shape[1]
    )
    lines = first.last + 1 if first.kernel == 1 else first.size  # others meet no window
    steps = (strides[0], strides[1], strides[-2] if len(axes) > 1 else 0, strides[-1])
    limit = lines * second.size
    return _Side(shape[0], lines, first.size, second.size, limit, 0, steps, block, at_once, reduce)


def _tile(most: int, channels: int) -> tuple[int, int]:
    """How many channels, and how many lines of them, are read at once: 16 to 64 in all."""
    columns = max(16, min(64, most))
    block = min(columns, _power(channels))
    return block, columns // block


def _step(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The distance of neighbours in a tensor whose entries are at equal ones, else None."""
    known = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size > 1]
    for (_, outer), (size, inner) in pairwise(known):
        if outer != size * inner:
            return None
    return known[-1][1] if known else 1


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """How far the entries of one sample lie apart."""
    return sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
