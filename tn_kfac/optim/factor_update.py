"""SINGD's update of one pair of factors: pure functions of coordinates.

K Kᵀ and C Cᵀ approximate the inverses of the damped factors of a layer, without inversion
(https://arxiv.org/abs/2312.05705, Figure 4). Every matrix is one of a structured space, one for
each channel group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tn_kfac.structures import Structure


class Curvature(NamedTuple):
    """One side's projected curvature H = Π(Kᵀ A K), factor K and Π(KᵀK) of dimension d."""

    H: Tensor
    K: Tensor
    KtK: Tensor
    dim: int
    space: Structure

    def mean_trace(self, matrix: Tensor) -> Tensor:
        """tr(matrix) / d, one number per channel group."""
        return self.space.trace(matrix) / self.dim


def measured(space: Structure, K: Tensor, statistic: Tensor, dim: int) -> Curvature:
    """The curvature of one side, from what its structure reads of it."""
    return Curvature(space.curvature(K, statistic), K, space.gram(K), dim, space)


def riemannian_gradient(own: Curvature, other: Curvature, damping: float, ikfac: bool) -> Tensor:
    """½ (τ(H_other) H_own + λ τ(Π KᵀK of the other) Π KᵀK − I); IKFAC sets both traces to 1."""
    H, damped = own.H, own.KtK * damping
    if not ikfac:
        H = own.space.scale(H, other.mean_trace(other.H))
        damped = own.space.scale(damped, other.mean_trace(other.KtK))
    return own.space.add_to_diagonal_(H + damped, -1.0) * 0.5


class Steps(NamedTuple):
    """How far factors move.

    Attributes:
        alpha: α₁, the Riemannian momentum.
        beta: β₁, the step size.
        normalised: Whether the gradient carries a factor 1 − α₁, and β₁ is divided by
            max(1, max|m|).
        limit: The most that β₁ times the norm of m may grow to, so that no curvature, however
            large, turns K around; None: anything.
    """

    alpha: float
    beta: float
    normalised: bool
    limit: float | None


def update_factor(
    own: Curvature, momentum: Tensor | None, gradient: Tensor, steps: Steps
) -> tuple[Tensor, Tensor]:
    """(K, m): m ← α m + gradient, K ← K − β K m; both as they were if that is not finite."""
    space, beta = own.space, steps.beta
    if steps.normalised:
        gradient = gradient * (1.0 - steps.alpha)
    elif steps.limit is not None and beta:
        most = space.spectral_norm(gradient, own.dim) * (beta / (steps.limit * (1.0 - steps.alpha)))
        gradient = space.scale(gradient, most.clamp(min=1.0).reciprocal())
    m = gradient if momentum is None else gradient + momentum * steps.alpha
    step = space.product(own.K, m)
    if steps.normalised:
        step = space.scale(step, space.largest(m).clamp(min=1.0).reciprocal())
    K = own.K - step * beta
    finite = torch.isfinite(space.largest(K)) & torch.isfinite(space.largest(m))
    before = torch.zeros_like(m) if momentum is None else momentum
    finite = finite.reshape(*finite.shape, *(1 for _ in K.shape[finite.dim() :]))
    return torch.where(finite, K, own.K), torch.where(finite, m, before)


def initial_factors(
    K: Curvature, C: Curvature, damping: float, ikfac: bool
) -> tuple[Tensor, Tensor]:
    """Factors at which SINGD (or IKFAC) would stay, were the curvature always this.

    `K` and `C` hold the curvature at K = C = I. Then Kᵀ (τ(H_C) A + λ τ(CᵀC) I) K = I gives K,
    the same with the sides exchanged C. Spaces without inverse roots get multiples of I.
    """
    one = torch.ones_like(K.mean_trace(K.H))
    ratio = one if ikfac else C.mean_trace(C.H)
    first = _root(K, ratio, damping * one)
    grown = damping * one if ikfac else damping * K.mean_trace(K.space.gram(first))
    left = one if ikfac else (1.0 - grown).clamp(min=0.0) / ratio  # τ(H_K)
    return first, _root(C, left, grown)


def _root(side: Curvature, ratio: Tensor, shift: Tensor) -> Tensor:
    """R with R Rᵀ = (ratio · H + shift · I)⁻¹, or the multiple of I of the same mean."""
    space = side.space
    identity = space.eye(len(side.H), side.dim, side.H.dtype, side.H.device)
    target = space.scale(side.H, ratio) + space.scale(identity, shift)
    mean = side.mean_trace(target)
    safe = torch.isfinite(mean) & (mean > 0)
    scalar = torch.where(safe, mean, torch.ones_like(mean)).rsqrt()
    multiple = space.scale(identity, scalar)
    root = space.inverse_root(target)
    if root is None:
        return multiple
    fits = torch.isfinite(space.largest(root)) & safe
    return torch.where(fits.reshape(-1, *(1 for _ in root.shape[1:])), root, multiple)
