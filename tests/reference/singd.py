"""SINGD of one matrix, dense and by the formulas of https://arxiv.org/abs/2312.05705, Fig. 4.

Everything is a d×d matrix; a structure is nothing but the projection Π onto it. A layer
with channel groups is that many independent matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda matrix: matrix,
    "diagonal": lambda matrix: torch.diag(torch.diag(matrix)),
}


@dataclass
class MatrixSINGD:
    """State and step of one weight matrix (out, in), a bias being its last column."""

    weight: Tensor
    structures: tuple[str, str]
    lr: float
    momentum: float
    damping: float
    alpha1: float
    lr_cov: float
    weight_decay: float = 0.0
    normalised: bool = False
    ikfac: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        out, ins = self.weight.shape
        eye_in, eye_out = (torch.eye(d, dtype=self.weight.dtype) for d in (ins, out))
        self.state = {"K": eye_in, "C": eye_out, "m_K": 0 * eye_in, "m_C": 0 * eye_out}
        self.velocity = torch.zeros_like(self.weight)

    def update_factors(self, A: Tensor, G: Tensor) -> None:
        """K, C and their momenta from the layer's factors."""
        K, C = self.state["K"], self.state["C"]
        project_K, project_C = (PROJECTIONS[name] for name in self.structures)
        H_K, H_C = project_K(K.T @ A @ K), project_C(C.T @ G @ C)
        KK, CC = project_K(K.T @ K), project_C(C.T @ C)
        alpha = 0.0 if self.ikfac else self.alpha1
        sides = [("K", H_K, KK, H_C, CC), ("C", H_C, CC, H_K, KK)]
        for name, own, own_gram, other, other_gram in sides:
            eye = torch.eye(len(own), dtype=own.dtype)
            tau = 1.0 if self.ikfac else torch.trace(other) / len(other)
            tau_gram = 1.0 if self.ikfac else torch.trace(other_gram) / len(other_gram)
            gradient = 0.5 * (tau * own + self.damping * tau_gram * own_gram - eye)
            if self.normalised:
                gradient = (1.0 - alpha) * gradient
            m = alpha * self.state[f"m_{name}"] + gradient
            size = max(1.0, m.abs().max().item()) if self.normalised else 1.0
            self.state[f"m_{name}"] = m
            self.state[name] = self.state[name] - self.lr_cov / size * self.state[name] @ m

    def step(self, gradient: Tensor, factors: tuple[Tensor, Tensor] | None) -> None:
        """One step along C Cᵀ gradient K Kᵀ, after a factor update if there are factors."""
        if factors is not None:
            self.update_factors(*factors)
        K, C = self.state["K"], self.state["C"]
        direction = C @ C.T @ gradient @ K @ K.T + self.weight_decay * self.weight
        self.velocity = self.momentum * self.velocity + direction
        self.weight = self.weight - self.lr * self.velocity
