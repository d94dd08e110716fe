"""The table of optimizers that every law is tested on: a new optimizer adds its entries."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tn_kfac import SINGD

OPTIMIZERS: dict[str, Callable[..., SINGD]] = {
    "SINGD diagonal": lambda model, *args, **options: SINGD(
        model, *args, **({"lr": 0.05, "T": 1, "lr_cov": 0.1, "structure": "diagonal"} | options)
    ),
    "SINGD dense": lambda model, *args, **options: SINGD(
        model, *args, **({"lr": 0.05, "T": 1, "lr_cov": 0.1, "structure": "dense"} | options)
    ),
}
each_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)

REFUSED = "^trained without Kronecker factors: "
"""How the warning begins that names the modules of a known kind without factors."""


class Table(nn.Module):
    """A user's own embedding: its type says nothing of factors."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width))

    def forward(self, indices: Tensor) -> Tensor:
        return nn.functional.embedding(indices, self.weight)


class Mixed(nn.Module):
    """Layers with factors, and parameters of every kind without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.embedding = nn.Embedding(10, 3)
        self.table = Table(10, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(torch.tanh(self.conv(x))).relu().mean((2, 3))
        tokens = (8 * x[:, 0, 2:4, 2]).long()
        known = self.embedding(tokens).sum(1) + self.table(tokens).sum(1)
        return self.head(self.scale * features + known)


def loss_of(model: nn.Module, digits: tuple[Tensor, Tensor], step: int, size: int = 8) -> Tensor:
    """Cross-entropy on the batch of a step, in the model's dtype."""
    batch = slice(step * size, (step + 1) * size)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(digits[0][batch].to(dtype)), digits[1][batch])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, digits: Any, steps: Iterable[int]
) -> list[float]:
    """One plain training loop over the batches of the steps; returns the losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, digits, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are now."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that differ from a copy."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def hooks_on(model: nn.Module) -> int:
    """The number of hooks of any kind on a model and its parts."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def is_identity(factor: Tensor) -> bool:
    """Whether a factor, (groups, d) or (groups, d, d), is still what it was at the start."""
    diagonal = factor.dim() == 2
    eye = torch.ones_like(factor) if diagonal else torch.eye(factor.shape[-1]).expand_as(factor)
    return torch.equal(factor, eye.to(factor.dtype))
