"""One contraction step on tensors; what an equation asks for is found out once."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from tn_kfac.kernels.products import multiplied
from tn_kfac.tensor_network.primitives.arrange import sum_over
from tn_kfac.tensor_network.slicing import DEFAULT_LIMIT

SMALL_ROWS, MANY_GRAMS = 64, 2048
"""Grams of fewer rows are split up until there are so many."""
Dims = tuple[int, ...]


class Roles(NamedTuple):
    """The roles of a tensor's dimensions if it is multiplied with itself as a matrix.

    `order` takes the dimensions (kept, row, row') to those of the result; rows come in its order.
    """

    kept: Dims
    summed: Dims
    row: Dims
    order: Dims


class Gram(NamedTuple):
    """How a tensor becomes matrices (kept, outer, inner), and their grams the result.

    The rows are the outer dimension or the inner one. `shape` is (kept, row, row'), with `parts`
    leading dimensions that are yet to be summed.
    """

    dims: Dims
    sizes: tuple[int, int, int]
    rows_outside: bool
    shape: tuple[int, ...]
    parts: int
    order: Dims


class Sum(NamedTuple):
    """Which dimensions of a tensor (or of a product entry by entry) go; `order` is of the rest."""

    gone: Dims
    order: Dims


def contract(equation: str, terms: list[Tensor], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """One einsum step times `scale`, in `dtype`; a tensor times itself is done on one copy."""
    if is_square(terms):
        (term, _) = terms
        gram = _gram_of(equation, term.shape, term.stride(), term.is_cuda)
        if gram is not None:
            return _gram(gram, term, dtype, scale)
    terms = [term.to(dtype) for term in terms]
    sum_ = _sum_of(equation)
    if sum_ is None:
        result = torch.einsum(equation, *terms)
    else:
        result = _summed(sum_, terms[0] if len(terms) == 1 else terms[0] * terms[1])
    return result if scale == 1.0 else result * scale


def is_square(terms: list[Tensor]) -> bool:
    """Whether a tensor is multiplied with itself."""
    return len(terms) == 2 and terms[0] is terms[1]


def _roles(equation: str) -> Roles | None:
    """The roles of dimensions, if a square is that of a matrix, with no axis repeated."""
    (first, second), output = _axes(equation)
    if first == second:
        return None
    pairs = list(zip(first, second, strict=True))
    shared = [dim for dim, (a, b) in enumerate(pairs) if a == b]
    row = [dim for dim, (a, b) in enumerate(pairs) if a != b]
    kept = [dim for dim in shared if first[dim] in output]
    rows = [axis for dim in row for axis in pairs[dim]]
    every = [first[dim] for dim in shared if first[dim] in output] + rows
    if sorted(every) != sorted(output) or len(set(rows)) < len(rows):
        return None
    row.sort(key=lambda dim: output.index(first[dim]))
    named = [first[dim] for dim in kept + row] + [second[dim] for dim in row]
    summed = tuple(dim for dim in shared if dim not in kept)
    return Roles(tuple(kept), summed, tuple(row), tuple(named.index(axis) for axis in output))


@lru_cache(maxsize=4096)
def _gram_of(
    equation: str, shape: tuple[int, ...], strides: tuple[int, ...], on_gpu: bool
) -> Gram | None:
    """What to do for a square; None if it is no gram.

    Where the tensor must be copied as a matrix, its contiguous axes stay innermost.
    """
    roles = _roles(equation)
    if roles is None:
        return None
    row, split = roles.row, _split(shape, roles) if on_gpu else ()
    kept, summed = split + roles.kept, roles.summed[len(split) :]
    rows_outside = any(strides[dim] == 1 and shape[dim] > 1 for dim in summed)
    outer, inner = (row, summed) if rows_outside else (summed, row)
    blocks, height, width = (prod(shape[d] for d in dims) for dims in (kept, outer, inner))
    return Gram(
        dims=kept + outer + inner,
        sizes=(blocks, height, width),
        rows_outside=rows_outside,
        shape=tuple(shape[dim] for dim in kept + row + row),
        parts=len(split),
        order=roles.order,
    )


@lru_cache(maxsize=4096)
def _sum_of(equation: str) -> Sum | None:
    """What is summed, if there is no matrix product and no axis repeated."""
    (axes, *others), output = _axes(equation)
    if len(set(axes)) < len(axes) or others not in ([], [axes]):
        return None
    gone = tuple(dim for dim, axis in enumerate(axes) if axis not in output)
    left = [axis for axis in axes if axis in output]
    return Sum(gone, tuple(left.index(axis) for axis in output))


def _axes(equation: str) -> tuple[list[str], str]:
    inputs, output = equation.split("->")
    return inputs.split(","), output


def _summed(sum_: Sum, term: Tensor) -> Tensor:
    """A tensor summed over what goes, in the output's order."""
    shape = term.shape
    single = all([shape[dim] == 1 for dim in sum_.gone])
    term = term.squeeze(sum_.gone) if single else sum_over(term, sum_.gone)
    return term.permute(sum_.order)


def _gram(gram: Gram, term: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale · Σ t[kept, summed, row] t[kept, summed, row'], t as one matrix per kept index."""
    rows = term.permute(gram.dims).reshape(gram.sizes)
    left, right = (rows, rows.mT) if gram.rows_outside else (rows.mT, rows)
    if term.dtype == dtype:
        result = torch.baddbmm(term.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)
    else:
        result = multiplied(left, right, dtype)
        result = result if scale == 1.0 else result.mul_(scale)
    result = result.reshape(gram.shape)
    result = result.sum(tuple(range(gram.parts))) if gram.parts else result
    return result.permute(gram.order)


def _split(shape: tuple[int, ...], roles: Roles) -> Dims:
    """Leading summed dimensions to keep for now: few small grams do not fill a GPU."""
    rows, batch = (prod([shape[dim] for dim in dims]) for dims in (roles.row, roles.kept))
    split: Dims = ()
    for dim in roles.summed[:-1]:
        grams = batch * shape[dim]
        if rows >= SMALL_ROWS or batch >= MANY_GRAMS or grams * rows * rows > DEFAULT_LIMIT:
            break
        split += (dim,)
        batch = grams
    return split
