"""Eigenvalues and eigenvectors of many symmetric blocks at once, anew or from the last ones."""

from __future__ import annotations

import torch
from torch import Tensor

from tn_kfac.kernels.products import precise, product

MORE_DAMPING = (1e-4, 1e-2)
"""What is added to a difficult block, relative to its mean diagonal entry: inverses of less
damped ones would have no accurate digits in float32."""
SHIFTS = (16.0, 2048.0)
"""What is added to a block's eigenvalues for a step, times its norm and the rounding; the second
where the first leaves it indefinite."""
NEARLY = 0.03
"""The norm of QᵀQ − I up to which `polished` makes it less than 1e-5."""


@torch.library.custom_op("tn_kfac::eigh", mutates_args=())
def eigh(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n, b) and eigenvectors (n, b, b); NaN where there are none.

    Eigenvalues that rounding cannot tell from zero are as large as the rounding is.
    """
    if stack.shape[-1] == 1:
        return stack[..., 0].clamp(min=0.0).contiguous(), torch.ones_like(stack)
    finite = stack.isfinite().flatten(1).all(-1)
    safe = torch.where(finite[:, None, None], stack, torch.eye(stack.shape[-1]).to(stack))
    try:
        values, vectors = torch.linalg.eigh(safe)
    except RuntimeError:  # of torch.linalg, or of the vendor's library beneath it
        values, vectors = map(torch.stack, zip(*map(_patient_eigh, safe), strict=True))
    return torch.where(finite[:, None], _raised(values), torch.nan), vectors.contiguous()


@eigh.register_fake
def _(stack: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(stack[..., 0]), torch.empty_like(stack)


def _patient_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of one matrix, in float64 on the CPU with ever more damping; NaN if all fails."""
    exact = matrix.double().cpu()
    eye = torch.eye(len(exact), dtype=exact.dtype)
    for damping in (0.0, *MORE_DAMPING):
        try:
            shifted = exact + damping * exact.diagonal().mean() * eye
            values, vectors = torch.linalg.eigh(shifted)
        except RuntimeError:
            continue
        return values.to(matrix), vectors.to(matrix)
    return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)


def _raised(values: Tensor) -> Tensor:
    """Eigenvalues, those that rounding cannot tell from zero as large as the rounding is."""
    least = torch.finfo(values.dtype).eps * values.amax(-1, True).clamp(min=0.0)
    return torch.maximum(values, least)


def orthogonal_step(stack: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors by one step of orthogonal iteration from the last ones.

    The Q of B · last, columns by falling Rayleigh quotients, and the quotients of Q
    (https://arxiv.org/abs/2409.11321, Algorithm 4). The last ones, with their quotients, of what
    has eigenvalues far below zero; NaN of what is not finite.

    Found without a Householder QR, which takes GPUs several times as long: the Q of a positive
    M = lastᵀ B last = L Lᵀ is L N⁻ᵀ, where Lᵀ L = N Nᵀ, for then M = (L N⁻ᵀ)(Nᵀ Lᵀ) and L N⁻ᵀ
    is orthogonal; and the quotients after it are the diagonal of Nᵀ N. M is nearly diagonal, and
    rounding is relative to its diagonal then, so small eigenvalues suffer no more than in QR. Those
    at rounding level need a shift of B, which changes no eigenvector. What M hangs on is computed
    in full precision. `last` must be orthogonal.
    """
    if stack.shape[-1] == 1:
        return stack[..., 0].clamp(min=0.0), torch.ones_like(stack)
    largest = torch.linalg.vector_norm(stack, torch.inf, dim=(-2, -1), keepdim=True)
    finite = largest.isfinite()
    unit = largest.clamp(min=torch.finfo(stack.dtype).tiny)
    image = precise(stack / unit, last)
    order = (last * image).sum(-2, keepdim=True).argsort(-1, descending=True).expand_as(last)
    last, image = last.gather(-1, order), image.gather(-1, order)
    M = precise(last.mT, image)
    quotients = M.diagonal(dim1=-2, dim2=-1).clone()
    L, shift, found = _shifted_cholesky(M)
    N, info = torch.linalg.cholesky_ex(precise(L.mT, L))
    turned = product(last, torch.linalg.solve_triangular(N.mT, L, upper=True, left=False))
    Q, off = polished(turned)
    kept = found & (info == 0)[:, None, None] & (off < NEARLY)
    values = torch.where(kept[..., 0], N.square().sum(-2) - shift[..., 0], quotients)
    values = torch.where(finite[..., 0], values * unit[..., 0], torch.nan)
    return _raised(values), torch.where(finite, torch.where(kept, Q, last), torch.nan)


def _shifted_cholesky(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L of M + s I, s and whether there is one, (n, 1, 1), for the least of `SHIFTS` that serves.

    M is overwritten.
    """
    norm = torch.linalg.matrix_norm(M, keepdim=True) * torch.finfo(M.dtype).eps
    little, much = (norm * shift for shift in SHIFTS)
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(little[..., 0])
    first, info = torch.linalg.cholesky_ex(M)
    diagonal.add_((much - little)[..., 0])
    second, again = torch.linalg.cholesky_ex(M)
    fits = (info == 0)[:, None, None]
    found = fits | (again == 0)[:, None, None]
    return torch.where(fits, first, second), torch.where(fits, little, much), found


def polished(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Nearly orthogonal matrices made orthogonal, and a bound of the norm of QᵀQ − I, (…, 1, 1).

    Q (I + E)^(−1/2) to the third order of E = QᵀQ − I, so that no rounding adds up over steps.
    """
    E = precise(Q.mT, Q)
    E.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    square = product(E, E)
    off = torch.linalg.matrix_norm(square, keepdim=True).sqrt()
    return product(Q, square.mul_(0.375).sub_(E, alpha=0.5)).add_(Q), off
