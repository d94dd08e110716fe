"""The structure that a budget of memory, or of work, allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tn_kfac.structures.base import Spec, Structure, require_integer
from tn_kfac.structures.block_diagonal import BlockDiagonal
from tn_kfac.structures.dense import Dense
from tn_kfac.structures.diagonal import Diagonal

LEAST_BLOCK = 8


@dataclass(frozen=True)
class Auto(Spec):
    """Dense where d² coordinates are within the budget, else the largest blocks that are.

    Where these had fewer than 8 rows, the factor is diagonal.

    Attributes:
        budget: The most coordinates of a factor.
    """

    budget: int = 1 << 20

    def __post_init__(self) -> None:
        require_integer("budget of Auto", self.budget, 1)

    @property
    def name(self) -> str:
        return "auto" if self.budget == Auto.budget else f"auto{self.budget}"

    def for_dim(self, dim: int) -> Structure:
        if dim * dim <= self.budget:
            return Dense()
        size = self.budget // dim
        return BlockDiagonal(size) if size >= LEAST_BLOCK else Diagonal()


@dataclass(frozen=True)
class Limited(Spec):
    """Dense factors up to a size, larger ones in blocks of that size, or diagonal.

    For optimizers that decompose factors, which costs O(d³).

    Attributes:
        most: The most rows of a dense factor or block.
        beyond: What larger factors are.
    """

    most: int
    beyond: Literal["blocks", "diagonal"] = "blocks"

    def __post_init__(self) -> None:
        require_integer("most of Limited", self.most, 1)
        if self.beyond not in ("blocks", "diagonal"):
            raise ValueError(f"beyond must be 'blocks' or 'diagonal', got {self.beyond!r}")

    @property
    def name(self) -> str:
        return f"dense{self.most}{self.beyond}"

    def for_dim(self, dim: int) -> Structure:
        if dim <= self.most:
            return Dense()
        return BlockDiagonal(self.most) if self.beyond == "blocks" else Diagonal()
