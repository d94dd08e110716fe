"""SINGD of one matrix, dense and by the formulas of https://arxiv.org/abs/2312.05705, Fig. 4.

Everything is a d×d matrix; a structure is nothing but the projection Π onto it. A layer
with channel groups is that many independent matrices.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor


def _weighted(matrix: Tensor, weight: Callable[[int, int], int]) -> Tensor:
    """Entry (i, j) times weight(i, j)."""
    d = matrix.shape[-1]
    weights = [[weight(i, j) for j in range(d)] for i in range(d)]
    return matrix * torch.tensor(weights, dtype=matrix.dtype)


def _diagonal(matrix: Tensor) -> Tensor:
    return _weighted(matrix, lambda i, j: i == j)


def _block_diagonal(matrix: Tensor, size: int) -> Tensor:
    return _weighted(matrix, lambda i, j: i // size == j // size)


def _auto(matrix: Tensor, budget: int = 2**20) -> Tensor:
    d = matrix.shape[-1]
    if d**2 <= budget:
        return matrix
    return _block_diagonal(matrix, budget // d) if budget >= 8 * d else _diagonal(matrix)


def _hierarchical(matrix: Tensor, k1: int, k2: int) -> Tensor:
    """[[A, 2B₁, 2B₂], [0, C, 0], [0, 2D, E]]; if there are fewer rows, E has what A left."""
    d = matrix.shape[-1]
    k1 = min(k1, d)
    k2 = min(k2, d - k1)

    def weight(i: int, j: int) -> int:
        if i < k1:
            return 1 if j < k1 else 2
        if i < d - k2:
            return i == j
        return 0 if j < k1 else 2 if j < d - k2 else 1

    return _weighted(matrix, weight)


def _arrow(matrix: Tensor, kept: Callable[[int, int, int], bool]) -> Tensor:
    """The diagonal, and twice the entries where kept(i, j, last index)."""
    last = matrix.shape[-1] - 1
    return _weighted(matrix, lambda i, j: 1 if i == j else 2 * kept(i, j, last))


def _triu_toeplitz(matrix: Tensor) -> Tensor:
    """Averages of the diagonals, those above the first one twice."""
    d, projected = matrix.shape[-1], torch.zeros_like(matrix)
    for m in range(d):
        total = sum(matrix[..., i, i + m] for i in range(d - m))
        for i in range(d - m):
            projected[..., i, i + m] = (2 if m else 1) * total / (d - m)
    return projected


PROJECTIONS: dict[str, Callable[..., Tensor]] = {
    "dense": lambda matrix: matrix,
    "diagonal": _diagonal,
    "auto": _auto,
    "auto([0-9]+)": _auto,
    "block([0-9]+)diagonal": _block_diagonal,
    "hierarchical([0-9]+)_([0-9]+)": _hierarchical,
    "triutoeplitz": _triu_toeplitz,
    "triltoeplitz": lambda matrix: _triu_toeplitz(matrix).mT,
    "triltopleftdiag": partial(_arrow, kept=lambda i, j, last: i == last),
    "trilbottomrightdiag": partial(_arrow, kept=lambda i, j, last: j == 0),
    "triutopleftdiag": partial(_arrow, kept=lambda i, j, last: j == last),
    "triubottomrightdiag": partial(_arrow, kept=lambda i, j, last: i == 0),
}
"""Π of symmetric matrices (*batch, d, d) by name; the numbers in a name are arguments."""


def projection(name: str) -> Callable[[Tensor], Tensor]:
    """Π of the structure with this name; it takes any matrix into the space."""
    for pattern, project in PROJECTIONS.items():
        if numbers := re.fullmatch(pattern, name):
            numbers = [int(number) for number in numbers.groups()]
            return lambda matrix: project(matrix, *numbers)
    raise KeyError(name)


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
        project_K, project_C = map(projection, self.structures)
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
