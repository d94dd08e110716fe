"""Moving averages of curvature, which nothing that is not finite can enter.

Each has the weight of what it holds beside it, so that averages / weight are debiased; nothing
is read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tn_kfac.curvature import Factors

State = dict[str, Any]


def update_averages(state: State, factors: Factors, decay: float) -> None:
    """A ← β A + (1 − β) Â, G likewise, and their weight; none of them if one is not finite."""
    fits = torch.isfinite(factors.A).all() & torch.isfinite(factors.G).all()
    for key, new in (("A", factors.A), ("G", factors.G)):
        _average(state[key], new, decay, fits)
    _average(state["weight"], torch.ones_like(state["weight"]), decay, fits)


def update_moments(state: State, moments: Tensor, decay: float) -> None:
    """The same for second moments in the eigenbasis."""
    fits = torch.isfinite(moments).all()
    _average(state["moments"], moments, decay, fits)
    _average(state["moments_weight"], torch.ones_like(state["moments_weight"]), decay, fits)


def _average(average: Tensor, new: Tensor, decay: float, fits: Tensor) -> None:
    average.copy_(torch.where(fits, average.lerp(new.to(average.dtype), 1.0 - decay), average))
