"""Matrix products by tensor cores, whose sums have another dtype than what is multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
ALIGNED = 8
"""Sizes that are multiples of it: rows begin at multiples of 16 bytes."""
LARGE, WIDE = 1 << 31, 128
"""From so many products of numbers on, and no narrower, matrices are cut into parts."""


def multiplied(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right for two matrices, or two batches of them, with sums in `dtype`.

    On a GPU the products of half-precision entries are formed by tensor cores: exactly, for a
    float32 holds the product of two of them. Their float32 sums are cut off instead of rounded,
    so they end too small: by 4e-5 of a sum of 25,000 squares, at most 7e-5 (on an H200).
    """
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and left.dtype in HALF and dtype == torch.float32:
        multiply = torch.bmm if left.dim() == 3 else torch.mm
        return multiply(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; of large float32 matrices on a GPU by tensor cores, several times as fast.

    a = a₁ + a₂ is cut into two bfloat16 parts, and a b = a₁ b₁ + a₁ b₂ + a₂ b₁ summed in float32.
    An entry is off by 4e-5 of Σ |a b| at most, of a few hundred terms by 1e-6 of it (TF32: 1e-3 and
    3e-5). Infinite entries may become NaN.
    """
    return parted(left, right) if _pays(left, right) else left @ right


def precise(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in full precision; of float32 as in `product` on a GPU that may use TF32."""
    rounds = left.is_cuda and left.dtype == right.dtype == torch.float32 and _rounds()
    return parted(left, right) if rounds else left @ right


@torch.compiler.assume_constant_result
def _rounds() -> bool:
    """Whether float32 products on a GPU may round what they multiply, to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def parted(left: Tensor, right: Tensor) -> Tensor:
    """The three products of the parts of two matrices, or two batches of them, in float32."""
    a, b = _parts(left)
    c, d = (a, b) if right is left else _parts(right)
    total = _add_product(_add_product(multiplied(a, c, torch.float32), a, d), b, c)
    return total[..., : left.shape[-2], : right.shape[-1]]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right, in place on a GPU."""
    if not total.is_cuda:
        return total + left.to(total.dtype) @ right.to(total.dtype)
    add = torch.baddbmm if left.dim() == 3 else torch.addmm
    return add(total, left, right, out_dtype=total.dtype, out=total)


def _pays(left: Tensor, right: Tensor) -> bool:
    if not (left.is_cuda and left.dtype == right.dtype == torch.float32):
        return False
    if left.dim() not in (2, 3) or left.shape[:-2] != right.shape[:-2]:
        return False
    sizes = (left.shape[-2], left.shape[-1], right.shape[-1])
    return min(sizes) >= WIDE and left.numel() * right.shape[-1] >= LARGE


def _parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 matrices whose sum is off by 2⁻¹⁷ of an entry at most.

    Zeros make their sizes multiples of `ALIGNED`: with odd ones (a column for the bias), no fast
    kernel takes them.
    """
    if matrix.stride(-1) != 1 and matrix.stride(-2) == 1:
        first, second = _parts(matrix.mT)
        return first.mT, second.mT
    *batch, rows, columns = matrix.shape
    sizes = [-(-size // ALIGNED) * ALIGNED for size in (rows, columns)]
    make = matrix.new_empty if sizes == [rows, columns] else matrix.new_zeros
    first, second = (make(*batch, *sizes, dtype=torch.bfloat16) for _ in range(2))
    inside = first[..., :rows, :columns].copy_(matrix)
    torch.sub(matrix, inside, out=second[..., :rows, :columns])
    return first, second
