"""The Triton kernel of `diagonals`: one launch for the input and the output gradient of a layer.

A program takes a tile of channels of a few samples, line by line. Pixels of a line are summed over
the windows of the second axis by a product with their 0/1 pattern on tensor cores (of values cut
into bfloat16 parts, so that nothing is rounded), and the lines by that of the first axis. The
program that is last to finish a tile adds what the others of that tile left, always in the same
order, so results are reproducible.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from tn_kfac.kernels.available import INTERPRETED
from tn_kfac.kernels.launching import Prepared


@triton.jit
def _met(pixel, offset, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, last):
    """Whether a window (up to the last) meets the pixel at the offset."""
    start = pixel + PADDING - offset * DILATION
    return (start >= 0) & (start <= last * STRIDE) & (start % STRIDE == 0)


@triton.jit
def _sums(
    x, begin, end, first, channels, lines, height, width, limit, passed, last_1, last_2,
    x_n, x_c, x_h, x_w, scale,
    K_1: tl.constexpr, S_1: tl.constexpr, P_1: tl.constexpr, D_1: tl.constexpr,
    K_2: tl.constexpr, S_2: tl.constexpr, P_2: tl.constexpr, D_2: tl.constexpr,
    REDUCE: tl.constexpr, PARTS: tl.constexpr, DOT: tl.constexpr,
    K: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ_n (scale · Σ_o x[o·S + k·D − P])², or Σ_n Σ_o x[…]², for k: (K, 16, BLOCK_C).

    Channels from `first` on. LINES are read at once, so few channels still fill a product.

    A sample has `height` lines of `width` pixels, of which `lines` are read. Where lines do not
    matter they are pieces of one, and pixels from `limit` on are none; `passed` of them are in
    each sample before.
    """
    column = tl.arange(0, LINES * BLOCK_C)
    c = first + column % BLOCK_C
    k_1 = tl.arange(0, K)[:, None]
    k_2 = tl.arange(0, 16)[:, None]
    total = tl.zeros((K, 16, BLOCK_C), tl.float32)
    base = x + begin.to(tl.int64) * x_n
    for n in range(begin, end):
        sums = tl.zeros((K, 16, LINES * BLOCK_C), tl.float32)
        for left in range(0, width, WIDTH):
            w = left + tl.arange(0, WIDTH)
            met_2 = _met(w[None, :], k_2, S_2, P_2, D_2, last_2) & (k_2 < K_2)
            met_2 = met_2 & (w < width)[None, :]
            wanted = tl.max(met_2.to(tl.int32), axis=0) > 0
            pattern = met_2.to(DOT)
            place = w[:, None] * x_w + c[None, :] * x_c
            for low in range(0, lines, LINES):
                line = low + column // BLOCK_C
                h = line * S_1 - P_1 if K_1 == 1 else line
                pixels = limit - n * passed - line * width
                there = (c < channels) & (h >= 0) & (h < height)
                inside = there[None, :] & wanted[:, None] & (w[:, None] < pixels[None, :])
                value = tl.load(base + (h * x_h)[None, :] + place, mask=inside, other=0.0)
                columns = tl.zeros((16, LINES * BLOCK_C), tl.float32)
                if PARTS == 1:
                    columns = tl.dot(pattern, value.to(DOT), columns)
                else:
                    value = value.to(tl.float32)
                    value = value if REDUCE else value * value
                    for _part in tl.static_range(PARTS):
                        rounded = value.to(tl.bfloat16)
                        columns = tl.dot(pattern, rounded.to(DOT), columns)
                        value -= rounded.to(tl.float32)
                met_1 = _met(h[None, :], k_1, S_1, P_1, D_1, last_1)
                sums += tl.where(met_1[:, None, :], columns[None], 0.0)
        if LINES > 1:
            sums = tl.sum(tl.reshape(sums, (K, 16, LINES, BLOCK_C)), axis=2)
        total += scale * sums * (scale * sums) if REDUCE else sums
        base += x_n
    return total


@triton.jit
def _finish(
    total, out, partial, counter, split, splits, size, first, channels, group, bias, factor,
    K_1: tl.constexpr, K_2: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Leave a program's sums in `partial`; of the last one of a tile: write the tile's result."""
    k_1 = tl.arange(0, K)[:, None, None]
    k_2 = tl.arange(0, 16)[None, :, None]
    c = first + tl.arange(0, BLOCK_C)[None, None, :]
    inside = (k_1 < K_1) & (k_2 < K_2) & (c < channels)
    mine = partial + split * size
    tl.store(mine + c * (K_1 * K_2) + k_1 * K_2 + k_2, total, mask=inside)
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
        tl.debug_barrier()
        end = tl.minimum(first + BLOCK_C, channels) * (K_1 * K_2)
        for begin in range(first * (K_1 * K_2), end, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            sums = tl.zeros((BLOCK,), tl.float32)
            for low in range(0, splits, AT_ONCE):
                s = low + tl.arange(0, AT_ONCE)[:, None]
                mask = (s < splits) & (i < end)[None, :]
                left = tl.load(partial + s * size + i[None, :], mask=mask, other=0.0,
                               cache_modifier=".cg")  # fmt: skip
                sums += tl.sum(left, axis=0)
            after = i // (K_1 * K_2 * group) * bias
            tl.store(out + i + after, sums * factor, mask=i < end)
        tl.store(counter, 0)


@triton.jit
def kernel(
    x, v, out, partial, counters, rows, terms, factor, scale, channels, group, last_1, last_2,
    samples, lines, height, width, limit, passed, x_n, x_c, x_h, x_w, tiles, splits, share,
    outputs, v_samples, v_lines, v_height, v_width, v_limit, v_passed, v_n, v_c, v_h, v_w,
    v_tiles, v_splits, v_share,
    K_1: tl.constexpr, S_1: tl.constexpr, P_1: tl.constexpr, D_1: tl.constexpr,
    K_2: tl.constexpr, S_2: tl.constexpr, P_2: tl.constexpr, D_2: tl.constexpr,
    BIAS: tl.constexpr, REDUCE: tl.constexpr, PARTS: tl.constexpr,
    V_REDUCE: tl.constexpr, V_PARTS: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
    LINES: tl.constexpr, V_LINES: tl.constexpr, V_WIDTH: tl.constexpr,
    V_CHANNELS: tl.constexpr, V_AT_ONCE: tl.constexpr,
    GROUPS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Programs of the input's tiles, then those of the output gradient's; see `diagonals`."""
    program = tl.program_id(0)
    size = channels * (K_1 * K_2)
    groups = channels // group
    G = out + size + groups * BIAS
    if program < tiles * splits:
        tile, split = program % tiles, program // tiles
        begin = split * share
        sums = _sums(
            x, begin, tl.minimum(begin + share, samples), tile * CHANNELS, channels, lines, height,
            width, limit, passed, last_1, last_2, x_n, x_c, x_h, x_w, scale,
            K_1, S_1, P_1, D_1, K_2, S_2, P_2, D_2, REDUCE, PARTS, DOT, K, WIDTH, LINES, CHANNELS,
        )  # fmt: skip
        _finish(sums, out, partial, counters + tile, split, splits, size, tile * CHANNELS,
                channels, group, BIAS, 1.0, K_1, K_2, K, CHANNELS, BLOCK, AT_ONCE)  # fmt: skip
        if program == 0:
            g = tl.arange(0, GROUPS)
            if BIAS:
                corner = out + g * (group * (K_1 * K_2) + 1) + group * (K_1 * K_2)
                tl.store(corner, tl.zeros((GROUPS,), tl.float32) + rows, mask=g < groups)
            tl.store(G + outputs, rows)
            tl.store(G + outputs + 1, terms)
    else:
        rank = program - tiles * splits
        v_tile, v_split = rank % v_tiles, rank // v_tiles
        v_begin = v_split * v_share
        v_sums = _sums(
            v, v_begin, tl.minimum(v_begin + v_share, v_samples), v_tile * V_CHANNELS, outputs,
            v_lines, v_height, v_width, v_limit, v_passed, v_lines - 1, v_width - 1,
            v_n, v_c, v_h, v_w, 1.0,
            1, 1, 0, 1, 1, 1, 0, 1, V_REDUCE, V_PARTS, DOT, 1, V_WIDTH, V_LINES, V_CHANNELS,
        )  # fmt: skip
        _finish(v_sums, G, partial + splits * size, counters + tiles + v_tile, v_split, v_splits,
                outputs, v_tile * V_CHANNELS, outputs, outputs, 0, factor, 1, 1, 1, V_CHANNELS,
                V_CHANNELS, V_AT_ONCE)  # fmt: skip


PART = tl.float32 if INTERPRETED else tl.bfloat16
"""What products are made of; the interpreter has none of bfloat16."""
WARPS, STAGES = 4, 3


def prepared(programs: int, constants: Mapping[str, Any]) -> Prepared:
    """The kernel for these constants."""
    known = {**constants, "DOT": PART}
    return Prepared(kernel, programs, known, num_warps=WARPS, num_stages=STAGES)
