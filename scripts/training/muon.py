"""torch's Muon for the matrices of a network, torch's AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon


def matrices(network: nn.Module) -> set[nn.Parameter]:
    """What Muon is meant for: two-dimensional weights but embeddings and the output layer's."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    left_out: list[nn.Module] = [m for m in network.modules() if isinstance(m, nn.Embedding)]
    excluded = {p for module in left_out + linear[-1:] for p in module.parameters()}
    return {p for p in network.parameters() if p.ndim == 2 and p not in excluded}


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers with one list of groups and one state.

    So schedules, checkpoints and Lightning see a single one.

    Args:
        model: The network.
        params: Param groups; all parameters that need gradients if None.
        lr: Of Muon. By its default adjustment it is scaled to the length of an AdamW update,
            so that it suits both.
        weight_decay: Of both.
        momentum: Of Muon.
        nesterov: Of Muon.
        adjust_lr_fn: Of Muon: "match_rms_adamw" or "original".
        adamw_lr: Of AdamW; `lr` if None.
        betas: Of AdamW.

    Raises:
        ValueError: If the network has no matrix for Muon, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        given = params or [{"params": [p for p in model.parameters() if p.requires_grad]}]
        suits = matrices(model)
        if not suits:
            raise ValueError("the model has no two-dimensional weight for Muon; take AdamW")
        inner, others = _split(given, suits, lr if adamw_lr is None else adamw_lr)
        self.parts: list[torch.optim.Optimizer] = [
            Muon(inner, lr, weight_decay, momentum, nesterov, adjust_lr_fn=adjust_lr_fn)
        ]
        if others:
            self.parts.append(AdamW(others, lr, (betas[0], betas[1]), weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give the parts our groups and our state, so that there is one of each."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _split(groups: Any, suits: set, adamw_lr: float) -> tuple[list[dict], list[dict]]:
    """Each group's matrices, and each group's others; none is empty."""
    inner, others = [], []
    for group in groups:
        of_muon = [p for p in group["params"] if p in suits]
        of_adamw = [p for p in group["params"] if p not in suits]
        if of_muon:
            inner.append({**group, "params": of_muon})
        if of_adamw:
            others.append({"lr": adamw_lr, **group, "params": of_adamw})
    return inner, others
