"""The optimizers, the settings among which each was tuned, and the winners.

A new optimizer is one entry of `OPTIMIZERS`. Every optimizer has the same budget: 16 settings of
150 steps in three rounds (6, 6 and 4), each round around the best of those before, at seed 0; the
winner has the lowest training loss at the end. All that was tried is in
benchmarks/results/curves-tune.json. Batches of 1000, warm-up and linear decay of the learning rate
are the same for all. An optimizer with a method `curvature` (for fisher="mc") has it called before
each backward pass, in the time that is counted.

What the tuning does not settle: in 150 steps SGD leaves the mean image with hardly any setting, so
its settings differ little; and both SINGDs won at the edge of their last grids (the least damping,
and the larger lr_cov of the diagonal one), so they may have more to give. Of
KFAC and EKFAC, fisher, T_inverse, exponent and damping_mode were not varied, and T hardly; three of
KFAC's settings went to a kl_clip of 0.01, with which it stalls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from benchmarks.published import PUBLISHED
from tn_kfac import KFAC, SINGD

Options = dict[str, Any]
Grid = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Entry:
    """How to build an optimizer, and how it was tuned."""

    make: Callable[..., torch.optim.Optimizer]
    """Called with the model and options."""
    base: Options
    """Options of every setting, unless a grid or `tuned` has others."""
    rounds: tuple[Grid, ...]
    """Grids: of each, the product of its values is tried."""
    tuned: Options

    def settings(self, which: str) -> Iterator[Options]:
        """The tuned setting, or all of the grids."""
        if which == "tuned":
            yield self.base | self.tuned
            return
        for grid in self.rounds:
            for values in product(*grid.values()):
                yield self.base | dict(zip(grid, values, strict=True))


def _plain(kind: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Of parameters instead of a model."""
    return lambda model, **options: kind(model.parameters(), **options)


def build(name: str, model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """An optimizer of the table."""
    return OPTIMIZERS[name].make(model, **options)


OPTIMIZERS: dict[str, Entry] = {
    "SGD": Entry(
        _plain(torch.optim.SGD),
        {"momentum": 0.9, "nesterov": True},
        (
            {"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
            {"lr": (1e-3, 3e-3, 1e-2), "momentum": (0.95, 0.99)},
            {"lr": (5e-3, 1.5e-2), "momentum": (0.8, 0.9)},
        ),
        {"lr": 5e-3, "momentum": 0.8},
    ),
    "AdamW": Entry(
        _plain(torch.optim.AdamW),
        {"betas": (0.9, 0.999), "weight_decay": 0.0},
        (
            {"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
            {"lr": (2e-3, 3e-3, 5e-3), "betas": ((0.9, 0.99), (0.95, 0.999))},
            {"lr": (2e-3, 4e-3), "betas": ((0.8, 0.999), (0.9, 0.999))},
        ),
        {"lr": 4e-3},
    ),
    "SINGD diagonal": Entry(
        SINGD,
        PUBLISHED | {"structure": "diagonal", "T": 1, "lr_cov": 0.1, "damping": 0.1},
        (
            {"lr": (0.03, 0.1, 0.3), "fisher": ("empirical", "mc")},
            {"lr": (0.01, 0.02), "damping": (0.03, 0.1, 0.3), "fisher": ("empirical",)},
            {
                "lr": (0.01,),
                "damping": (0.003, 0.01),
                "lr_cov": (0.1, 0.2),
                "fisher": ("empirical",),
            },
        ),
        {"lr": 0.01, "damping": 0.003, "lr_cov": 0.2, "fisher": "empirical"},
    ),
    "SINGD dense": Entry(
        SINGD,
        PUBLISHED | {"structure": "dense", "T": 1, "lr_cov": 0.1, "damping": 0.1},
        (
            {"lr": (0.03, 0.1, 0.3), "fisher": ("empirical", "mc")},
            {"lr": (0.01, 0.03), "damping": (0.03, 0.3, 1.0), "fisher": ("mc",)},
            {"lr": (0.01,), "damping": (0.003, 0.01), "lr_cov": (0.1, 0.2), "fisher": ("mc",)},
        ),
        {"lr": 0.01, "damping": 0.003, "lr_cov": 0.1, "fisher": "mc"},
    ),
    "KFAC": Entry(
        KFAC,
        {
            "fisher": "mc",
            "T": 1,
            "T_inverse": 5,
            "inverse": "cholesky",
            "precondition": "momentum",
            "kl_clip": None,
        },
        (
            {"lr": (0.01, 0.03, 0.1), "damping": (0.01, 0.1)},
            {"lr": (0.3,), "damping": (0.1, 0.3, 1.0), "kl_clip": (None, 1e-2)},
            {"lr": (0.3, 1.0), "damping": (3.0, 10.0)},
        ),
        {"lr": 0.3, "damping": 1.0},
    ),
    "EKFAC": Entry(
        KFAC,
        {
            "ekfac": True,
            "fisher": "mc",
            "T": 1,
            "T_inverse": 10,
            "precondition": "momentum",
            "kl_clip": None,
        },
        (
            {"lr": (0.1, 0.3), "damping": (0.3, 1.0, 3.0)},
            {"lr": (0.5, 1.0), "damping": (3.0, 6.0, 12.0)},
            {"lr": (0.2, 0.3), "damping": (2.0, 4.0), "T": (2,)},
        ),
        {"lr": 0.3, "damping": 3.0},
    ),
}
