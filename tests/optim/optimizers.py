"""The table of optimizers that every law is tested on: a new optimizer adds its entries."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.published import PUBLISHED
from tn_kfac import KFAC, SINGD


@dataclass(frozen=True)
class Entry:
    """An optimizer of the table, to be called like its class.

    Attributes:
        kind: The class.
        defaults: Options of every test that gives none of its own.
        gentle: Options for small steps, in tests that say `gentle=True`.
        scheduled: The option that may be a callable of the step.
        pace: By which rates are multiplied where losses shall fall within a few steps.
    """

    kind: type[SINGD] | type[KFAC]
    defaults: dict[str, Any]
    gentle: dict[str, Any]
    scheduled: str
    pace: float = 1.0

    def __call__(self, model: nn.Module, *args: Any, gentle: bool = False, **options: Any) -> Any:
        given = self.defaults | (self.gentle if gentle else {}) | options
        return self.kind(model, *args, **given)


SLOWLY, HEAVILY = {"lr_cov": 0.02}, {"damping": 1.0}
SINGD_OPTIONS = PUBLISHED | {"lr": 0.05, "T": 1, "lr_cov": 0.1}
KFAC_OPTIONS = {"lr": 0.05, "damping": 0.02, "kl_clip": None, "T_inverse": 2}
# Of one basis alone: of equal eigenvalues, rounding chooses the basis, and so the step.
EKFAC = {"ekfac": True, "structure": "diagonal"}
NEWTON = {"inverse": "newton-schulz", "T_inverse": 1}
OPTIMIZERS: dict[str, Entry] = {
    "SINGD": Entry(SINGD, {}, SLOWLY, "lr_cov", pace=5.0),
    "SINGD diagonal": Entry(SINGD, SINGD_OPTIONS | {"structure": "diagonal"}, SLOWLY, "lr_cov"),
    "SINGD dense": Entry(SINGD, SINGD_OPTIONS | {"structure": "dense"}, SLOWLY, "lr_cov"),
    "KFAC": Entry(KFAC, KFAC_OPTIONS, HEAVILY, "damping"),
    "EKFAC": Entry(KFAC, KFAC_OPTIONS | EKFAC, HEAVILY, "damping"),
    "KFAC lag": Entry(KFAC, KFAC_OPTIONS | {"lag": 1}, HEAVILY, "damping"),
    "KFAC newton-schulz": Entry(KFAC, KFAC_OPTIONS | NEWTON, HEAVILY, "damping"),
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


def two_layers() -> nn.Module:
    """Linear layers with and without a bias, in float64."""
    torch.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 10, bias=False)]
    return nn.Sequential(*layers).double()


def joint(layer: nn.Linear, of: str = "grad") -> Tensor:
    """The weight's gradient (or, of="data", the weight), a bias being its last column."""
    weight = getattr(layer.weight, of)
    if layer.bias is None:
        return weight.clone()
    return torch.cat([weight, getattr(layer.bias, of)[:, None]], 1)


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


def factors_of(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The factors of a layer, from the state of the parameter that owns it."""
    return (state["K"], state["C"]) if "K" in state else (state["A"], state["G"])


def first_factor(state: dict[str, Any]) -> Tensor:
    """The input's factor."""
    return factors_of(state)[0]


def is_fresh(factor: Tensor) -> bool:
    """Whether a factor, (groups, d) or (groups, d, d), is still what it was at the start."""
    return is_identity(factor) or not factor.any()


def is_identity(factor: Tensor) -> bool:
    """Whether it is still what SINGD starts with; of blocks, (groups, d, b), too."""
    if factor.dim() == 2:
        return torch.equal(factor, torch.ones_like(factor))
    row, column = (torch.arange(size) for size in factor.shape[1:])
    eye = (row % factor.shape[2])[:, None] == column
    return torch.equal(factor, eye.expand_as(factor).to(factor.dtype))
