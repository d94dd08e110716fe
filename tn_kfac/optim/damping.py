"""Damping of Kronecker-factored curvature, and what preconditions with it.

The curvature of a layer is G ⊗ A. With damping λ, a preconditioner is one of

    factored  (A + π √λ I)⁻ᵉ and (G + √λ / π I)⁻ᵉ, with π² = τ(A) / τ(G), τ the mean eigenvalue
              (https://arxiv.org/abs/1503.05671, Section 6.3)
    each      (A + λ I)⁻ᵉ and (G + λ I)⁻ᵉ
    exact     (G ⊗ A + λ I)⁻ᵉ, in the eigenbasis of A and G

where the exponent e is 1 for the natural gradient.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

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


class Turned(NamedTuple):
    """A gradient matrix, and the state whose eigenvalues and eigenvectors precondition it."""

    state: State
    matrix: Tensor
    spaces: tuple[Structure, Structure]

    @property
    def bases(self) -> tuple[Tensor, Tensor]:
        """The eigenvectors of A and of G."""
        return self.state["A_basis"], self.state["G_basis"]


def in_eigenbasis(
    parts: Sequence[Turned], mode: Mode, damping: Damping, exponent: float
) -> list[Tensor]:
    """The preconditioned gradient matrices, by eigenvalues and eigenvectors in the states."""
    values = [_denominators(part.state, mode, damping) for part in parts]
    least = [torch.finfo(v.dtype).tiny for v in values]
    torch._foreach_clamp_min_(values, least)  # without damping, 0 / 0 is 0
    if exponent == 0.5:
        torch._foreach_sqrt_(values)
    turned = [to_basis(part.matrix, part.spaces, part.bases) for part in parts]
    scaled = torch._foreach_div(turned, values)
    return [from_basis(s, p.spaces, p.bases) for s, p in zip(scaled, parts, strict=True)]


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
    return torch.where(weight > 0, state["moments"] / weight, products)


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
