"""Matrix products whose sums have another dtype than the matrices."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def multiplied(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right for two matrices, or two batches of them, with sums in `dtype`.

    On a GPU the products of half-precision entries are formed by tensor cores: exactly, for a
    float32 holds the product of two of them. Their float32 sums are cut off instead of rounded,
    so they end too small: by 4e-5 of a sum of 25,000 squares, at most 7e-5 (on an H200).
    """
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and left.dtype in HALF and dtype == torch.float32:
        product = torch.bmm if left.dim() == 3 else torch.mm
        return product(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)
