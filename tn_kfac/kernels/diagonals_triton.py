"""The Triton kernel of `diagonals`: one launch for the input and the output gradient of a layer.

Each program sums tiles of channels over a few samples. The program that is last to finish a tile
adds what the others of that tile left, always in the same order, so results are reproducible.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _met(pixel, offset, PADDING: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, last):
    """Whether a window (up to the last) meets the pixel at the offset."""
    start = pixel + PADDING - offset * DILATION
    return (start >= 0) & (start <= last * STRIDE) & (start % STRIDE == 0)


@triton.jit
def _pixel_sums(
    x, begin, end, c, channels, pixels, every, x_n, x_c, x_p, scale,
    REDUCE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Σ_n (scale · Σ_p x)², or Σ_n Σ_p x², of a tile of channels: (1, BLOCK_C).

    There are `every` pixels in all, so the last sample may have fewer than the others.
    """
    total = tl.zeros((1, BLOCK_C), tl.float32)
    base = x + begin.to(tl.int64) * x_n
    for n in range(begin, end):
        sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for first in range(0, pixels, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            inside = (p < tl.minimum(pixels, every - n * pixels))[:, None] & (c < channels)[None, :]
            tile = tl.load(base + p[:, None] * x_p + c[None, :] * x_c, mask=inside, other=0.0)
            tile = tile.to(tl.float32)
            sums += tile if REDUCE else tile * tile
        sample = tl.sum(sums, axis=0)[None, :]
        total += scale * sample * (scale * sample) if REDUCE else sample
        base += x_n
    return total


@triton.jit
def _lines(
    base, first, end, step: tl.constexpr, c, channels, w, wanted, x_c, x_h, x_w, lines,
    REDUCE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Add the lines first, first + step, … before `end` to `lines`, (BLOCK_W, BLOCK_C)."""
    inside = wanted[None, :, None] & (c < channels)[None, None, :]
    place = w[None, :, None] * x_w + c[None, None, :] * x_c
    for low in range(first, end, step * BLOCK_H):
        h = (low + step * tl.arange(0, BLOCK_H))[:, None, None]
        tile = tl.load(base + h * x_h + place, mask=inside & (h < end), other=0.0).to(tl.float32)
        lines += tl.sum(tile if REDUCE else tile * tile, axis=0)
    return lines


@triton.jit
def _offset_sums(
    cols, total, k_1: tl.constexpr, w, last, scale, REDUCE: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KERNELS: tl.constexpr,
):  # fmt: skip
    """Add the sums of columns over the windows of the second axis to total[k_1 · K + k_2]."""
    kernel = tl.arange(0, KERNELS)[:, None]
    for k_2 in tl.static_range(K):
        met = _met(w, k_2, P, S, D, last)
        sums = tl.sum(tl.where(met[:, None], cols, 0.0), axis=0)[None, :]
        sums = scale * sums * (scale * sums) if REDUCE else sums
        total += tl.where(kernel == k_1 * K + k_2, sums, 0.0)
    return total


@triton.jit
def _window_sums(
    x, begin, end, c, channels, height, width, last_1, last_2, x_n, x_c, x_h, x_w, scale,
    K_1: tl.constexpr, S_1: tl.constexpr, P_1: tl.constexpr, D_1: tl.constexpr,
    K_2: tl.constexpr, S_2: tl.constexpr, P_2: tl.constexpr, D_2: tl.constexpr,
    CLASSES: tl.constexpr, KERNELS: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The same for sums over windows, (KERNELS, BLOCK_C): Σ_n (scale · Σ_o x[o·S + k·D − P])².

    Lines that windows meet at every offset of their class modulo the stride are summed once;
    each offset then adds the few that it meets besides.
    """
    total = tl.zeros((KERNELS, BLOCK_C), tl.float32)
    w = tl.arange(0, BLOCK_W)
    wanted = w < 0
    for k_2 in tl.static_range(K_2):
        wanted = wanted | _met(w, k_2, P_2, S_2, D_2, last_2)
    wanted = wanted & (w < width)
    base = x + begin.to(tl.int64) * x_n
    for _n in range(begin, end):
        for residue in tl.static_range(S_1):
            high = tl.minimum(last_1 * S_1 - P_1, height - 1) + 1
            high = tl.maximum(high, 0)
            low = tl.minimum(tl.maximum((K_1 - 1) * D_1 - P_1, 0), high)
            low += (residue + S_1 - low % S_1) % S_1
            high += (residue + S_1 - high % S_1) % S_1
            common = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
            if (CLASSES >> residue) & 1:
                common = _lines(base, low, high, S_1, c, channels, w, wanted, x_c, x_h, x_w,
                                common, REDUCE, BLOCK_H)  # fmt: skip
            for k_1 in tl.static_range(K_1):
                if (residue + P_1 - k_1 * D_1) % S_1 == 0:
                    own = tl.maximum(k_1 * D_1 - P_1, 0)
                    own += (residue + S_1 - own % S_1) % S_1
                    until = tl.minimum(last_1 * S_1 + k_1 * D_1 - P_1, height - 1) + 1
                    cols = _lines(base, own, tl.minimum(low, until), S_1, c, channels, w, wanted,
                                  x_c, x_h, x_w, common, REDUCE, 1)  # fmt: skip
                    cols = _lines(base, tl.maximum(high, own), until, S_1, c, channels, w, wanted, x_c, x_h, x_w,
                                  cols, REDUCE, 1)  # fmt: skip
                    total = _offset_sums(cols, total, k_1, w, last_2, scale, REDUCE,
                                         K_2, S_2, P_2, D_2, KERNELS)  # fmt: skip
        base += x_n
    return total


@triton.jit
def _finish(
    total, out, partial, counter, split, splits, size, c, channels, group, bias, factor,
    OFFSETS: tl.constexpr, KERNELS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write a tile's result, once all its programs have left theirs in `partial`."""
    kernel = tl.arange(0, KERNELS)[:, None]
    index = c[None, :] * OFFSETS + kernel
    inside = (kernel < OFFSETS) & (c < channels)[None, :]
    place = out + index + (c // group)[None, :] * bias
    if splits == 1:
        tl.store(place, total * factor, mask=inside)
    else:
        tl.store(partial + split * size + index, total, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            sums = tl.zeros_like(total)
            for first in range(0, splits, AT_ONCE):
                s = first + tl.arange(0, AT_ONCE)[:, None, None]
                left = tl.load(
                    partial + s * size + index[None], mask=inside[None] & (s < splits),
                    other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                sums += tl.sum(left, axis=0)
            tl.store(place, sums * factor, mask=inside)
            tl.store(counter, 0)


@triton.jit
def kernel(
    x, v, out, partial, counters, rows, terms, factor, scale, channels, group, height, last_1,
    last_2, x_h, samples, width, every_x, x_n, x_c, x_w, tiles_x, splits_x, share_x,
    outputs, v_samples, positions, every_v, v_n, v_c, v_p, tiles_v, splits_v, share_v,
    K_1: tl.constexpr, S_1: tl.constexpr, P_1: tl.constexpr, D_1: tl.constexpr,
    K_2: tl.constexpr, S_2: tl.constexpr, P_2: tl.constexpr, D_2: tl.constexpr,
    CLASSES: tl.constexpr, KERNELS: tl.constexpr, BIAS: tl.constexpr,
    REDUCE_X: tl.constexpr, REDUCE_V: tl.constexpr,
    X_H: tl.constexpr, X_W: tl.constexpr, X_C: tl.constexpr,
    V_P: tl.constexpr, V_C: tl.constexpr, X_ONCE: tl.constexpr, V_ONCE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Programs of the input's tiles, then those of the output gradient's; see `diagonals`.

    A kernel of one offset that meets every pixel has CLASSES = 0: lines are of no matter.
    """
    program = tl.program_id(0)
    offsets: tl.constexpr = K_1 * K_2
    size = channels * offsets
    groups = channels // group
    end_of_a = size + groups * BIAS
    if program < tiles_x * splits_x:
        tile, split = program % tiles_x, program // tiles_x
        c = tile * X_C + tl.arange(0, X_C)
        begin = split * share_x
        end = tl.minimum(begin + share_x, samples)
        if CLASSES == 0:
            total = _pixel_sums(x, begin, end, c, channels, width, every_x, x_n, x_c, x_w, scale,
                                REDUCE_X, X_W, X_C)  # fmt: skip
        else:
            total = _window_sums(
                x, begin, end, c, channels, height, width, last_1, last_2, x_n, x_c, x_h, x_w,
                scale, K_1, S_1, P_1, D_1, K_2, S_2, P_2, D_2, CLASSES, KERNELS, REDUCE_X,
                X_H, X_W, X_C,
            )  # fmt: skip
        _finish(total, out, partial, counters + tile, split, splits_x, size, c, channels, group,
                BIAS, 1.0, offsets, KERNELS, X_ONCE)  # fmt: skip
        if program == 0:
            g = tl.arange(0, GROUPS)
            if BIAS:
                corner = out + g * (group * offsets + 1) + group * offsets
                tl.store(corner, tl.zeros((GROUPS,), tl.float32) + rows, mask=g < groups)
            tl.store(out + end_of_a + outputs, rows)
            tl.store(out + end_of_a + outputs + 1, terms)
    else:
        rest = program - tiles_x * splits_x
        tile, split = rest % tiles_v, rest // tiles_v
        c = tile * V_C + tl.arange(0, V_C)
        begin = split * share_v
        end = tl.minimum(begin + share_v, v_samples)
        total = _pixel_sums(v, begin, end, c, outputs, positions, every_v, v_n, v_c, v_p, 1.0,
                            REDUCE_V, V_P, V_C)  # fmt: skip
        _finish(total, out + end_of_a, partial + splits_x * size, counters + tiles_x + tile, split,
                splits_v, outputs, c, outputs, outputs, 0, factor, 1, 1, V_ONCE)  # fmt: skip
