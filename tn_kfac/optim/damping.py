"""Damping of Kronecker-factored curvature, and what preconditions with it.

The curvature of a layer is G ⊗ A. With damping λ, a preconditioner is one of

    factored  (A + π √λ I)⁻ᵉ and (G + √λ / π I)⁻ᵉ, with π² = τ(A) / τ(G), τ the mean eigenvalue
              (https://arxiv.org/abs/1503.05671, Section 6.3)
    each      (A + λ I)⁻ᵉ and (G + λ I)⁻ᵉ
    exact     (G ⊗ A + λ I)⁻ᵉ, in the eigenbasis of A and G

where the exponent e is 1 for the natural gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tn_kfac.structures import Structure

Mode = Literal["factored", "each", "exact"]
Damping = float | Tensor | tuple[float, float]
State = dict[str, Any]


def shifts(
    mode: Mode, damping: Damping, means: tuple[Tensor, Tensor]
) -> tuple[Tensor | float, Tensor | float]:
    """What is added to the eigenvalues of A and of G, whose means are given, (groups)."""
    if isinstance(damping, tuple):
        return damping
    if mode == "each":
        return damping, damping
    ratio = (means[0] / means[1]).sqrt()
    pi = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
    root = damping**0.5
    return root * pi, root / pi


def in_eigenbasis(
    state: State,
    matrix: Tensor,
    spaces: tuple[Structure, Structure],
    mode: Mode,
    damping: Damping,
    exponent: float,
) -> Tensor:
    """The preconditioned gradient matrix, by eigenvalues and eigenvectors in the state."""
    bases = (state["A_basis"], state["G_basis"])
    values = _denominators(state, mode, damping)
    values = values.clamp(min=torch.finfo(values.dtype).tiny)  # without damping, 0 / 0 is 0
    scaled = to_basis(matrix, spaces, bases) / values**exponent
    return from_basis(scaled, spaces, bases)


def _denominators(state: State, mode: Mode, damping: Damping) -> Tensor:
    """The damped eigenvalues of the layer's curvature, (groups, d_out, d_in)."""
    a, g = state["A_values"], state["G_values"]
    if mode == "exact":
        assert not isinstance(damping, tuple)
        return kronecker_eigenvalues(state) + damping
    shift_a, shift_g = shifts(mode, damping, (a.mean(-1, True), g.mean(-1, True)))
    return (g + shift_g)[..., :, None] * (a + shift_a)[..., None, :].to(g.dtype)


def kronecker_eigenvalues(state: State) -> Tensor:
    """Those of G ⊗ A, (groups, d_out, d_in); of EKFAC, second moments as soon as there are."""
    products = state["G_values"][..., :, None] * state["A_values"][..., None, :]
    if "moments" not in state:
        return products
    weight = state["moments_weight"][:, None, None]
    tiny = torch.finfo(weight.dtype).tiny
    return torch.where(weight > 0, state["moments"] / weight.clamp(min=tiny), products)


def by_inverses(state: State, matrix: Tensor, spaces: tuple[Structure, Structure]) -> Tensor:
    """The gradient matrix times the inverses (or inverse roots) in the state."""
    return from_basis(matrix, spaces, (state["A_inverse"], state["G_inverse"]))


def to_basis(
    matrix: Tensor, spaces: tuple[Structure, Structure], bases: tuple[Tensor, Tensor]
) -> Tensor:
    """Q_Gᵀ · matrix · Q_A, in the dtype of Q_G."""
    inner = spaces[0].apply_transposed(bases[0], matrix.mT.to(bases[0].dtype)).mT
    return spaces[1].apply_transposed(bases[1], inner.to(bases[1].dtype))


def from_basis(
    matrix: Tensor, spaces: tuple[Structure, Structure], bases: tuple[Tensor, Tensor]
) -> Tensor:
    """Q_G · matrix · Q_Aᵀ, in the dtype of Q_G."""
    inner = spaces[0].apply(bases[0], matrix.mT.to(bases[0].dtype)).mT
    return spaces[1].apply(bases[1], inner.to(bases[1].dtype))
