"""The Triton kernels of `window_gram`."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tn_kfac.kernels.available import INTERPRETED

if TYPE_CHECKING:
    from tn_kfac.kernels.window_gram import Geometry

BLOCK, DEPTH = 128, 64
"""Columns of a tile's side, and rows that are read at once."""
PROGRAMS, LEAST = 528, 512
"""How many programs there should be (four times an H200's processors), and the fewest rows of
one."""
OUT_ROWS, OUT_COLUMNS = 16, 128
"""Of the result that a program writes."""


@triton.jit
def _tiles(pair):
    """(i, j) of a tile on or above the diagonal, i ≤ j: pair = j (j + 1) / 2 + i."""
    j = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > pair, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= pair, j + 1, j)
    return pair - j * (j + 1) // 2, j


@triton.jit
def _place(
    column, step_1, step_2, C: tl.constexpr, K_2: tl.constexpr,
    DILATION_1: tl.constexpr, DILATION_2: tl.constexpr,
):  # fmt: skip
    """How far an entry of a window, (k_1, k_2, c) as one number, is from its first one."""
    k = column // C
    return (k // K_2) * DILATION_1 * step_1 + (k % K_2) * DILATION_2 * step_2 + column % C


@triton.jit
def _products(
    x, parts, step_n, step_1, step_2, rows, steps, positions, width, groups, pairs,
    C: tl.constexpr, K_2: tl.constexpr, COLUMNS: tl.constexpr,
    STRIDE_1: tl.constexpr, STRIDE_2: tl.constexpr,
    DILATION_1: tl.constexpr, DILATION_2: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Program (share, group, pair): a tile of the gram of a share of the rows."""
    program = tl.program_id(0)
    i, j = _tiles(program % pairs)
    group = (program // pairs) % groups
    row = (program // pairs // groups) * steps * DEPTH + tl.arange(0, DEPTH)
    left, right = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    left_place = _place(left, step_1, step_2, C, K_2, DILATION_1, DILATION_2)
    right_place = _place(right, step_1, step_2, C, K_2, DILATION_1, DILATION_2)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(steps):
        here, window = row < rows, row % positions
        first = (row // positions).to(tl.int64) * step_n + group * C
        first += (window // width) * STRIDE_1 * step_1 + (window % width) * STRIDE_2 * step_2
        pixel = (x + first)[:, None]
        a = tl.load(pixel + left_place[None, :], here[:, None] & (left < COLUMNS)[None, :], 0.0)
        b = tl.load(pixel + right_place[None, :], here[:, None] & (right < COLUMNS)[None, :], 0.0)
        total = tl.dot(tl.trans(a), b, total)
        row += DEPTH
    tile = parts + program.to(tl.int64) * (BLOCK * BLOCK)
    inside = tl.arange(0, BLOCK)
    tl.store(tile + inside[:, None] * BLOCK + inside[None, :], total)


@triton.jit
def _gather(
    parts, out, shares, groups, pairs, blocks,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum the shares of each tile; mirror them; order entries (c, k) instead of (k, c)."""
    program = tl.program_id(0)
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % blocks) * WIDTH + tl.arange(0, WIDTH)[None, :]
    group = tl.program_id(1)
    here = (row < COLUMNS) & (column < COLUMNS)
    one, other = (row % K) * C + row // K, (column % K) * C + column // K
    low, high = tl.minimum(one, other), tl.maximum(one, other)
    i, j = low // BLOCK, high // BLOCK
    place = (j * (j + 1) // 2 + i) * (BLOCK * BLOCK) + (low % BLOCK) * BLOCK + high % BLOCK
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for share in range(shares):
        first = (share * groups + group).to(tl.int64) * pairs * (BLOCK * BLOCK)
        total += tl.load(parts + first + place, here, 0.0)
    out += group.to(tl.int64) * COLUMNS * COLUMNS
    tl.store(out + row.to(tl.int64) * COLUMNS + column, total, here)


def window_gram(x: Tensor, geometry: Geometry) -> Tensor:
    """The gram of x (n, *pixels, groups · c), whose channels are neighbours in memory."""
    g, columns = geometry, geometry.columns
    sides = triton.cdiv(columns, BLOCK)
    pairs = sides * (sides + 1) // 2
    rows = x.shape[0] * g.positions
    shares = max(1, min(triton.cdiv(PROGRAMS, pairs * g.groups), rows // LEAST))
    steps = triton.cdiv(triton.cdiv(rows, shares), DEPTH)
    shares = triton.cdiv(rows, steps * DEPTH)
    count = shares * g.groups * pairs
    parts = torch.empty(count * BLOCK * BLOCK, dtype=torch.float32, device=x.device)
    _products[(count,)](
        x, parts, x.stride(0), x.stride(1), x.stride(2), rows, steps, g.positions, g.width,
        g.groups, pairs, C=g.channels, K_2=g.kernel[1], COLUMNS=columns,
        STRIDE_1=g.stride[0], STRIDE_2=g.stride[1],
        DILATION_1=g.dilation[0], DILATION_2=g.dilation[1],
        BLOCK=BLOCK, DEPTH=DEPTH, **({} if INTERPRETED else {"num_warps": 8, "num_stages": 3}),
    )  # fmt: skip
    out = torch.empty(g.groups, columns, columns, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(columns, OUT_COLUMNS)
    _gather[(triton.cdiv(columns, OUT_ROWS) * blocks, g.groups)](
        parts,
        out,
        shares,
        g.groups,
        pairs,
        blocks,
        C=g.channels,
        K=columns // g.channels,
        COLUMNS=columns,
        BLOCK=BLOCK,
        ROWS=OUT_ROWS,
        WIDTH=OUT_COLUMNS,
    )
    return out
