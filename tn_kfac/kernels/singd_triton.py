"""Triton kernels of SINGD with diagonal factors: one launch for all layers.

Both read the addresses of a layer's (or parameter's) tensors from a table, and from `programs`
which part of which one a program does.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from tn_kfac.kernels.launching import Prepared


@triton.jit
def _pointer(table, place: tl.constexpr, kind: tl.constexpr):
    return tl.load(table + place).to(tl.pointer_type(kind))


@triton.jit
def _traces(statistic, factor, dim, norm, BLOCK: tl.constexpr):
    """(Σ K² A, Σ K²)."""
    curvature = tl.zeros((BLOCK,), tl.float32)
    gram = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, dim, BLOCK):
        i = first + tl.arange(0, BLOCK)
        K = tl.load(factor + i, mask=i < dim, other=0.0)
        H = tl.load(statistic + i, mask=i < dim, other=0.0) * norm
        curvature += K * H * K
        gram += K * K
    return tl.sum(curvature, axis=0), tl.sum(gram, axis=0)


@triton.jit
def _gradient(statistic, factor, i, dim, norm, ratio, shift):
    """K and ½ (ratio · K² A + shift · K² − 1)."""
    K = tl.load(factor + i, mask=i < dim, other=0.0)
    H = tl.load(statistic + i, mask=i < dim, other=0.0) * norm
    return K, 0.5 * (ratio * (K * H * K) + shift * (K * K) - 1.0)


@triton.jit
def _factor(
    statistic, factor, momentum, dim, norm, ratio, shift, alpha, beta, limit,
    NORMALISED: tl.constexpr, LIMITED: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m ← α m + gradient, K ← K − β K m, unless something is not finite then."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, dim, BLOCK):
        i = first + tl.arange(0, BLOCK)
        _, gradient = _gradient(statistic, factor, i, dim, norm, ratio, shift)
        if NORMALISED:
            gradient *= 1.0 - alpha
            if MOMENTUM:
                gradient += alpha * tl.load(momentum + i, mask=i < dim, other=0.0)
        largest = tl.maximum(largest, tl.where(i < dim, tl.abs(gradient), 0.0))
    most = tl.max(largest, axis=0)
    grown = 1.0
    step = beta
    if NORMALISED:
        grown = 1.0 - alpha
        step = beta / tl.maximum(most, 1.0)
    elif LIMITED:
        grown = 1.0 / tl.maximum(most * (beta / (limit * (1.0 - alpha))), 1.0)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for writes in tl.static_range(2):
        fits = tl.sum(wrong, axis=0) == 0
        for first in range(0, dim, BLOCK):
            i = first + tl.arange(0, BLOCK)
            K, m = _gradient(statistic, factor, i, dim, norm, ratio, shift)
            m *= grown
            if MOMENTUM:
                m += alpha * tl.load(momentum + i, mask=i < dim, other=0.0)
            K -= step * (K * m)
            if writes == 0:
                finite = (K - K == 0.0) & (m - m == 0.0)
                wrong += tl.where(finite | (i >= dim), 0, 1)
            else:
                tl.store(factor + i, K, mask=(i < dim) & fits)
                if MOMENTUM:
                    tl.store(momentum + i, m, mask=(i < dim) & fits)


@triton.jit
def update_factors(
    table, programs, loss_scale, damping, alpha, beta, limit,
    TERMS: tl.constexpr, SCALED: tl.constexpr, IKFAC: tl.constexpr, NORMALISED: tl.constexpr,
    LIMITED: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each channel group of each layer: SINGD's update of K and C.

    Of a layer the table holds the addresses of statistics (see `diagonals`), K, C, m_K and m_C,
    then groups and the dimensions of K and C. TERMS: G is multiplied (1) or divided (2) by the
    number of loss terms.
    """
    layer = table + tl.load(programs + 2 * tl.program_id(0)) * 8
    group = tl.load(programs + 2 * tl.program_id(0) + 1).to(tl.int64)
    groups, ins, outs = tl.load(layer + 5), tl.load(layer + 6), tl.load(layer + 7)
    A = _pointer(layer, 0, tl.float32)
    G = A + groups * ins
    counts = G + groups * outs
    A, G = A + group * ins, G + group * outs
    K = _pointer(layer, 1, tl.float32) + group * ins
    C = _pointer(layer, 2, tl.float32) + group * outs
    m_K = _pointer(layer, 3, tl.float32) + group * ins
    m_C = _pointer(layer, 4, tl.float32) + group * outs
    norm_A = 1.0 / tl.maximum(tl.load(counts), 1.0)
    norm_G = 1.0
    terms = tl.load(counts + 1)
    if TERMS == 1:
        norm_G = terms
    if TERMS == 2:
        norm_G = 1.0 / tl.where(terms > 0, terms, 1.0)
    if SCALED:
        scale = tl.load(loss_scale)
        norm_G = norm_G / (scale * scale)
    ratio_K, ratio_C, shift_K, shift_C = 1.0, 1.0, damping, damping
    if not IKFAC:
        curvature_K, gram_K = _traces(A, K, ins, norm_A, BLOCK)
        curvature_C, gram_C = _traces(G, C, outs, norm_G, BLOCK)
        ratio_K, shift_K = curvature_C / outs, damping * gram_C / outs
        ratio_C, shift_C = curvature_K / ins, damping * gram_K / ins
    _factor(A, K, m_K, ins, norm_A, ratio_K, shift_K, alpha, beta, limit,
            NORMALISED, LIMITED, MOMENTUM, BLOCK)  # fmt: skip
    _factor(G, C, m_C, outs, norm_G, ratio_C, shift_C, alpha, beta, limit,
            NORMALISED, LIMITED, MOMENTUM, BLOCK)  # fmt: skip


@triton.jit
def _block(table, programs, ROOT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The block of a parameter that this program takes.

    Its row of the table, where its entries are, and what rows and columns are multiplied by.
    Of a parameter the table holds the addresses of itself, its gradient, its momentum, the
    factors of rows and columns; rows of each group, columns; the distance of rows' factors and
    that of groups' columns' factors; columns of one pixel, and pixels; the addresses of its sums
    of squares and its length. Columns are in the order (channel, pixel) in the factor, in memory
    in that or, for channels_last, in the other.
    """
    part = programs + 4 * tl.program_id(0)
    tensor = table + tl.load(part) * 13
    group = tl.load(part + 1).to(tl.int64)
    r = tl.load(part + 2) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.load(part + 3) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows, columns = tl.load(tensor + 5), tl.load(tensor + 6)
    channels, pixels = tl.load(tensor + 9).to(tl.int32), tl.load(tensor + 10).to(tl.int32)
    row = group * rows + r
    across = _pointer(tensor, 3, tl.float32) + row * tl.load(tensor + 7)
    along = _pointer(tensor, 4, tl.float32) + group * tl.load(tensor + 8)
    place = c % channels * pixels + c // channels
    left = tl.load(across, mask=r < rows, other=0.0)
    right = tl.load(along + place, mask=c < columns, other=0.0)
    if ROOT:
        left, right = tl.abs(left), tl.abs(right)
    else:
        left, right = left * left, right * right
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    return tensor, row[:, None] * columns + c[None, :], inside, left[:, None], right[None, :]


@triton.jit
def _gradients(
    tensor, at, inside, momentum, fresh, KIND: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, FIRST: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """What is preconditioned: gradients, or their momentum, which is new already if SMOOTHED."""
    gradient = tl.load(_pointer(tensor, 1, KIND) + at, mask=inside, other=0.0).to(tl.float32)
    if FIRST:
        if MOMENTUM:
            buffer = _pointer(tensor, 2, KIND) + at
            smooth = tl.load(buffer, mask=inside, other=0.0).to(tl.float32)
            if not SMOOTHED:
                rounded = (momentum * smooth + gradient).to(KIND)
                tl.store(buffer, rounded, mask=inside)
                smooth = rounded.to(tl.float32)
            gradient = gradient + momentum * smooth if NESTEROV else smooth
        gradient *= fresh
    return gradient


@triton.jit
def sum_squares(
    table, programs, momentum, fresh,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROOT: tl.constexpr,
    FIRST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum of squares of each block of the preconditioned gradients."""
    tensor, at, inside, left, right = _block(table, programs, ROOT, BLOCK_R, BLOCK_C)
    gradient = _gradients(
        tensor, at, inside, momentum, fresh, KIND, MOMENTUM, NESTEROV, FIRST, False
    )
    direction = gradient * right * left
    part = programs + 4 * tl.program_id(0)
    group, r, c = tl.load(part + 1), tl.load(part + 2), tl.load(part + 3)
    across = tl.cdiv(tl.load(tensor + 5), BLOCK_R)
    along = tl.cdiv(tl.load(tensor + 6), BLOCK_C)
    number = (group * across + r) * along + c
    total = tl.sum(tl.sum(direction * direction, axis=1), axis=0)
    tl.store(_pointer(tensor, 11, tl.float32) + number, total)


@triton.jit
def set_lengths(table, rms, BLOCK: tl.constexpr):
    """One program for each layer: rms · √entries over the norm of its direction.

    Of a layer the table holds the address of the first sum of squares, the number of them, that
    of entries, and the address of the result.
    """
    layer = table + tl.program_id(0) * 4
    count = tl.load(layer + 1).to(tl.int32)
    squares = _pointer(layer, 0, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(squares + i, mask=i < count, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0))
    # At least 2⁻⁶³, the root of the least normal number, as `tn_kfac.optim.updates` has; keeps NaN.
    norm = tl.where(norm < 1.0842021724855044e-19, 1.0842021724855044e-19, norm)
    length = rms * tl.sqrt(tl.load(layer + 2).to(tl.float32))
    tl.store(_pointer(layer, 3, tl.float32), length / norm)


@triton.jit
def step_parameters(
    table, programs, lr, momentum, decay, shrink, fresh,
    KIND: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, ROOT: tl.constexpr,
    FIRST: tl.constexpr, SMOOTHED: tl.constexpr, LENGTHS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Precondition gradients of rows and columns by their factors, then step as SGD does."""
    tensor, at, inside, left, right = _block(table, programs, ROOT, BLOCK_R, BLOCK_C)
    gradient = _gradients(
        tensor, at, inside, momentum, fresh, KIND, MOMENTUM, NESTEROV, FIRST, SMOOTHED
    )
    address = _pointer(tensor, 0, KIND) + at
    parameter = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    direction = gradient * right * left
    if LENGTHS:
        direction *= tl.load(_pointer(tensor, 12, tl.float32))
    direction += decay * parameter
    if MOMENTUM and not FIRST:
        buffer = _pointer(tensor, 2, KIND) + at
        smooth = momentum * tl.load(buffer, mask=inside, other=0.0).to(tl.float32) + direction
        tl.store(buffer, smooth.to(KIND), mask=inside)
        direction = direction + momentum * smooth if NESTEROV else smooth
    tl.store(address, (shrink * parameter - lr * direction).to(KIND), mask=inside)


def prepared_update(programs: int, constants: Mapping[str, Any]) -> Prepared:
    """`update_factors` with these constants."""
    return Prepared(update_factors, programs, constants)


def prepared_lengths(programs: int, constants: Mapping[str, Any]) -> Prepared:
    """`set_lengths` with these constants."""
    return Prepared(set_lengths, programs, constants)


def prepared_squares(programs: int, dtype: torch.dtype, constants: Mapping[str, Any]) -> Prepared:
    """`sum_squares` for parameters of a dtype."""
    return Prepared(sum_squares, programs, {"KIND": _kind(dtype), **constants})


def prepared_step(programs: int, dtype: torch.dtype, constants: Mapping[str, Any]) -> Prepared:
    """`step_parameters` for parameters of a dtype."""
    return Prepared(step_parameters, programs, {"KIND": _kind(dtype), **constants})


def _kind(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))
