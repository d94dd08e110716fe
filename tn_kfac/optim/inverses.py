"""Inverses and eigenvectors of many symmetric blocks at once, none of which can end a run.

What reads values on the host is an operator of its own, which compiled steps call as it is.

Blocks of equal size, of whatever layers, are stacked and decomposed in one call. A block that
cannot be decomposed is tried again with more damping in float64; what still fails comes back
as NaN, and the caller keeps what it had.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tn_kfac.kernels.products import product
from tn_kfac.optim.eigenvectors import MORE_DAMPING, eigh, orthogonal_step, polished
from tn_kfac.structures import Structure

Inverse = Literal["eigh", "qr", "cholesky", "newton-schulz"]
EIGEN = ("eigh", "qr")
"""Those that keep eigenvectors."""
Blockwise = Callable[..., tuple[Tensor, ...]]
COLD_ITERATIONS = 19
"""Of Newton-Schulz from a multiple of I: enough for condition numbers up to 1e8."""
WARM_ITERATIONS = ((0.1, 1), (0.3, 3), (0.5, 5), (1.0, COLD_ITERATIONS))
"""Of Newton-Schulz from the last inverse, if up to so much of the average is new since."""
ROOT_ITERATIONS = 30
"""Of the one for square roots, whose order is two instead of three."""
SAFE_RADIUS = 0.95
"""Of I − B X, for Newton-Schulz to start from X as it is; it converges below 1."""
ALONE = 1 << 22
"""Entries of a block that keeps a GPU busy alone: such ones are not stacked, for the memory."""


class Request(NamedTuple):
    """Matrices of one space, (groups, *coordinates) each, whose blocks are arguments together."""

    space: Structure
    matrices: tuple[Tensor, ...]


def eigen(
    requests: Sequence[Request], iterations: int = COLD_ITERATIONS
) -> list[tuple[Tensor, Tensor]]:
    """(eigenvalues (groups, d), coordinates of the eigenvectors) of the first matrix of each.

    If there is a second one, it holds the last eigenvectors, which one step improves (but for
    COLD_ITERATIONS).
    """
    function: Blockwise = orthogonal_step
    if iterations == COLD_ITERATIONS or any(len(r.matrices) == 1 for r in requests):
        function, requests = eigh, [r._replace(matrices=r.matrices[:1]) for r in requests]
    else:
        requests = [_orthogonal(request) for request in requests]
    found = []
    for request, parts in zip(requests, _blockwise(function, requests), strict=True):
        values = torch.cat([part[0].flatten(1) for part in parts], dim=-1)
        found.append((values, request.space.from_blocks([part[1] for part in parts])))
    return found


def _orthogonal(request: Request) -> Request:
    """With last eigenvectors that are orthogonal, also where they were stored in few digits."""
    matrix, last = request.matrices
    if last.dtype.itemsize >= torch.float32.itemsize:
        return request
    blocks = [polished(block.float())[0] for block in request.space.blocks(last)]
    return request._replace(matrices=(matrix, request.space.from_blocks(blocks)))


def warm_iterations(new: float | None) -> int:
    """How many iterations of Newton-Schulz, by the new part of an average; None: all is new."""
    if new is None:
        return COLD_ITERATIONS
    return next(count for limit, count in WARM_ITERATIONS if min(new, 1.0) <= limit)


def inverses(
    requests: Sequence[Request], method: Inverse, exponent: float, iterations: int
) -> list[Tensor]:
    """The matrices' inverses (exponent 1) or inverse square roots (1/2), in coordinates.

    Requests hold the matrix and, for "newton-schulz", its last inverse, from which `iterations`
    start (but for COLD_ITERATIONS). Square roots are found by "newton-schulz" alone: a
    Cholesky factor is no symmetric root.
    """
    function: Blockwise = _cholesky_inverse
    if method == "newton-schulz":
        warm = partial(newton_inverse, iterations=iterations)
        function = warm if exponent == 1 else newton_root
    return [
        request.space.from_blocks([inverse for (inverse,) in parts])
        for request, parts in zip(requests, _blockwise(function, requests), strict=True)
    ]


def _blockwise(function: Blockwise, requests: Sequence[Request]) -> list[list[tuple[Tensor, ...]]]:
    """`function` of all blocks of equal size in one call; for each request, by block size."""
    stacks: dict[tuple[object, ...], list[tuple[Tensor, ...]]] = defaultdict(list)
    places = []
    for request in requests:
        parts = zip(*map(request.space.blocks, request.matrices), strict=True)
        for blocks in parts:
            key = (blocks[0].shape[-1], blocks[0].dtype, blocks[0].device)
            places.append((key, len(stacks[key]), blocks[0].shape[:2]))
            stacks[key].append(tuple(_exact(block.flatten(0, 1)) for block in blocks))
    done = {key: _stacked(function, stack) for key, stack in stacks.items()}
    results = iter(
        [tuple(part.unflatten(0, shape) for part in done[key][at]) for key, at, shape in places]
    )
    return [[next(results) for _ in r.space.blocks(r.matrices[0])] for r in requests]


def _exact(stack: Tensor) -> Tensor:
    """In a dtype that can be decomposed."""
    return stack.to(torch.promote_types(stack.dtype, torch.float32)).contiguous()


def _stacked(
    function: Blockwise, arguments: Sequence[tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """`function` of the concatenated arguments, split again; of large ones, one by one."""
    counts = [len(blocks[0]) for blocks in arguments]
    if len(counts) == 1:
        return [function(*arguments[0])]
    if arguments[0][0][0].numel() >= ALONE:
        return [function(*blocks) for blocks in arguments]
    joined = [torch.cat(list(parts)) for parts in zip(*arguments, strict=True)]
    return list(zip(*(part.split(counts) for part in function(*joined)), strict=True))


def _cholesky_inverse(stack: Tensor) -> tuple[Tensor]:
    return (_cholesky(stack),)


@torch.library.custom_op("tn_kfac::cholesky_inverse", mutates_args=())
def _cholesky(stack: Tensor) -> Tensor:
    """The inverses (n, b, b); NaN where a matrix is not positive, however it is damped."""
    inverse, failed = _try_cholesky(stack)
    if failed.any():
        exact = stack[failed].double()
        mean = exact.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(stack.shape[-1], dtype=exact.dtype, device=exact.device)
        found = torch.full_like(exact, torch.nan)
        for damping in reversed(MORE_DAMPING):  # the least that suffices comes last
            attempt, still = _try_cholesky(exact + damping * mean * eye)
            found = torch.where(still[:, None, None], found, attempt)
        inverse[failed] = found.to(stack.dtype)
    return inverse.contiguous()


def _try_cholesky(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses, (n, b, b), and which matrices have none, (n)."""
    lower, info = torch.linalg.cholesky_ex(stack)
    failed = info != 0
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    return torch.cholesky_inverse(torch.where(failed[:, None, None], eye, lower)), failed


@_cholesky.register_fake
def _(stack: Tensor) -> Tensor:
    return torch.empty_like(stack)


def newton_inverse(stack: Tensor, last: Tensor, iterations: int) -> tuple[Tensor]:
    """Inverses by X ← X (I + R + R²), R = I − B X, from the last ones; the host reads nothing.

    R is cubed by the three products of an iteration, so an inverse that a step's change left 5 %
    off is 1.3e-4 off after one. R has real eigenvalues, since B and X are positive, whose largest
    one ⁴√(tr R⁴) bounds: where that may be too large to converge, X is shrunk first. What is lost
    none the less, or too large for its dtype's digits, starts again from I / ‖B‖. From there X
    grows towards B⁻¹ from below: in between, it is the inverse of something more damped.

    Of large float32 matrices on a GPU products are off by up to 4e-5 (`kernels.products`):
    R is, times the norms of B and X. In averages of which 5 % are new, preconditioned gradients
    were 2 % off for a condition number of 1e3 (as in float32), 24 % for 1e4 (float32: 4 %), and as
    of something much more damped for 1e5 (float32: 22 %).
    """
    eye = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
    norm = _norm(stack)
    cold = eye / norm
    warm = iterations != COLD_ITERATIONS
    X = last if warm else cold
    for at in range(iterations):
        R = product(stack, X).neg_()
        R.diagonal(dim1=-2, dim2=-1).add_(1.0)
        square = product(R, R)
        scale, series = _shrunk(R, square) if warm and at == 0 else (1.0, R.add_(square))
        X = product(X, series).add_(X)
        X = torch.lerp(X, X.mT, 0.5).mul_(scale)
    diagonal = X.diagonal(dim1=-2, dim2=-1)
    most = (torch.finfo(X.dtype).eps * norm).reciprocal()[..., 0]  # beyond, no digit is right
    kept = X.isfinite().all(-1).all(-1) & ((diagonal > 0) & (diagonal < most)).all(-1)
    X = torch.where(kept[:, None, None], X, cold)
    return (torch.where(_finite(stack), X, torch.nan),)


def _shrunk(R: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """s, so that the iteration converges from s X, and R' + R'² of its R' = (1 − s) I + s R.

    `square` is R², which is overwritten.
    """
    fourth = (square * square.mT).sum((-2, -1), keepdim=True)
    bound = fourth.clamp(min=0.0) ** 0.25
    s = torch.where(bound < SAFE_RADIUS, 1.0, 2.0 * SAFE_RADIUS / (1.0 + bound))
    kept = 1.0 - s
    series = square.mul_(s * s).addcmul_(R, s * (1.0 + 2.0 * kept))
    series.diagonal(dim1=-2, dim2=-1).add_((kept * (1.0 + kept))[..., 0])
    return s, series


def newton_root(stack: Tensor, last: Tensor) -> tuple[Tensor]:
    """Inverse square roots by the coupled iteration; nothing is read on the host.

    Y ← Y T, Z ← T Z with T = (3 I − Z Y) / 2 from Y = B / ‖B‖ and Z = I
    (Higham, Functions of Matrices, equation 6.35). The last root is no start for it: Z and Y
    must commute with B, and without that the error grows where B's eigenvalues are apart.
    """
    size = stack.shape[-1]
    eye = torch.eye(size, dtype=stack.dtype, device=stack.device)
    norm = _norm(stack)
    Y, Z = stack / norm, eye.expand_as(stack)
    for _ in range(ROOT_ITERATIONS):
        T = 1.5 * eye - 0.5 * product(Z, Y)
        Y, Z = product(Y, T), product(T, Z)
    root = 0.5 * (Z + Z.mT) * norm.rsqrt()
    return (torch.where(_finite(stack), root, torch.nan),)


def _norm(stack: Tensor) -> Tensor:
    """An upper bound of the largest eigenvalue of each matrix, (n, 1, 1), positive."""
    tiny = torch.finfo(stack.dtype).tiny
    return torch.linalg.matrix_norm(stack, keepdim=True).clamp(min=tiny)


def _finite(stack: Tensor) -> Tensor:
    """Which matrices are finite, (n, 1, 1)."""
    return stack.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
