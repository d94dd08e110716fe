"""Measurements during training: speed, learning rate, curvature."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm

from training.types import NonNegativeInt

FACTORS, SYMMETRIC = ("K", "C", "A", "G"), ("A", "G")
CONDITIONED = 512  # rows of a matrix whose singular values may be computed in passing


class Speed(Callback):
    """Logs images a second over all ranks, and the first group's learning rate."""

    def __init__(self) -> None:
        self.begun, self.images = 0.0, 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.images == 0:
            self.begun = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += len(batch[1]) * trainer.world_size
        if (batch_idx + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pl_module.log("train/images_per_second", self.images / (perf_counter() - self.begun))
        pl_module.log("train/lr", float(trainer.optimizers[0].param_groups[0]["lr"]))
        self.images = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images = 0  # its time is not training time


class Curvature(Callback):
    """Logs the health of Kronecker factors and the length of steps.

    `curvature/K_norm_max` is the largest norm over layers of the factors K (of SINGD; C, A
    and G likewise), `…_norm_min` the smallest; `curvature/K_ratio_max` the largest ratio,
    in one layer, of largest to smallest size of a diagonal entry; `curvature/K_condition_max`
    the largest condition number of matrices (or blocks) of at most 512 rows, if there are any.
    `update/norm` is the norm of the step of all parameters, `update/relative` the same over theirs.

    Args:
        every_n_steps: Steps between two measurements; 0 measures nothing.
    """

    def __init__(self, every_n_steps: NonNegativeInt = 0) -> None:
        self.every_n_steps, self.before = every_n_steps, []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.every_n_steps and (trainer.global_step + 1) % self.every_n_steps == 0:
            self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.before:
            return
        after = [p.detach() for p in pl_module.parameters()]
        step = get_total_norm([new - old for new, old in zip(after, self.before, strict=True)])
        values = {"update/norm": step, "update/relative": step / get_total_norm(self.before)}
        self.before = []
        pl_module.log_dict(values | factor_values(trainer.optimizers[0]))


def factor_values(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The values that `Curvature` logs of factors; none for other optimizers."""
    values = {}
    for name in FACTORS:
        factors = [s[name] for s in optimizer.state.values() if isinstance(s.get(name), Tensor)]
        if not factors:
            continue
        norms = torch.stack([torch.linalg.vector_norm(factor.float()) for factor in factors])
        values[f"curvature/{name}_norm_max"] = norms.max()
        values[f"curvature/{name}_norm_min"] = norms.min()
        sizes = [_diagonal(factor).float().abs() for factor in factors]
        ratios = [size.max() / size.min().clamp(min=1e-30) for size in sizes]
        values[f"curvature/{name}_ratio_max"] = torch.stack(ratios).max()
        dense = [f for f in factors if _is_square(f) and f.shape[-1] <= CONDITIONED]
        if dense:
            finite = [torch.nan_to_num(factor.float()) for factor in dense]  # or the SVD fails
            conditions = [_condition(factor, name in SYMMETRIC).max() for factor in finite]
            values[f"curvature/{name}_condition_max"] = torch.stack(conditions).max()
    return values


def _condition(factors: Tensor, symmetric: bool) -> Tensor:
    """Condition numbers; of symmetric matrices by eigenvalues, which take less time."""
    sizes = torch.linalg.eigvalsh(factors).abs() if symmetric else torch.linalg.svdvals(factors)
    return sizes.amax(-1) / sizes.amin(-1)


def _is_square(factor: Tensor) -> bool:
    return factor.ndim >= 2 and factor.shape[-1] == factor.shape[-2]


def _diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1) if _is_square(factor) else factor
