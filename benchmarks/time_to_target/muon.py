"""torch's Muon for the matrices of a network, convolutions among them, and AdamW for all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

JOINT = {"qkv": 3}
"""Layers whose weight is several matrices, one below the other."""


def matrices(model: nn.Module) -> dict[Tensor, int]:
    """Weights for Muon, each with the number of matrices that it holds.

    Those of linear layers but the last, and of convolutions that are not grouped.
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = {m.weight: JOINT.get(name.rpartition(".")[2], 1) for name, m in linear[:-1]}
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    return found | {m.weight: 1 for m in convolutions if m.groups == 1}


class MuonAdamW(torch.optim.Optimizer):
    """Muon, with rates scaled to the length of AdamW's updates so that one rate suits both.

    Muon takes matrices only: weights are given to it as views (output, everything else).
    """

    def __init__(
        self, model: nn.Module, params: Any, lr: float, momentum: float = 0.95
    ) -> None:  # weight decay is that of the groups
        suits = matrices(model)
        self._views: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        inner, others = [], []
        for group in params:
            views = [v for p in group["params"] if p in suits for v in self._split(p, suits[p])]
            rest = [p for p in group["params"] if p not in suits]
            inner += [group | {"params": views}] if views else []
            others += [group | {"params": rest}] if rest else []
        muon = torch.optim.Muon(inner, lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr, fused=True)
        self.parts: list[torch.optim.Optimizer] = [muon, adamw]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part, groups in zip(self.parts, self._grouped(), strict=True):
            part.param_groups = groups  # one dictionary each, so that a schedule reaches both

    def _grouped(self) -> list[list[dict[str, Any]]]:
        groups = iter(self.param_groups)
        return [[next(groups) for _ in part.param_groups] for part in self.parts]

    def _split(self, weight: nn.Parameter, count: int) -> list[nn.Parameter]:
        views = [nn.Parameter(rows) for rows in weight.data.flatten(1).chunk(count)]
        self._views.append((weight, views))
        return views

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for weight, _ in self._views:
            weight.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for weight, views in self._views:
            if weight.grad is not None:
                grads: tuple[Tensor, ...] = weight.grad.flatten(1).chunk(len(views))
                for view, grad in zip(views, grads, strict=True):
                    view.grad = grad
        for part in self.parts:
            part.step()
