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
    """A ← β A + (1 − β) Â, G likewise, and their weight; none of them if one is not finite.

    With n weights, these are n layers.
    """
    count = len(state["weight"])
    fits = _finite(factors.A, count) & _finite(factors.G, count)
    for key, new in (("A", factors.A), ("G", factors.G), ("weight", 1.0)):
        _average(state[key], new, decay, fits)


def update_moments(state: State, moments: Tensor, decay: float) -> None:
    """The same for second moments in the eigenbasis."""
    fits = _finite(moments, len(state["moments_weight"]))
    for key, new in (("moments", moments), ("moments_weight", 1.0)):
        _average(state[key], new, decay, fits)


def _finite(tensor: Tensor, count: int) -> Tensor:
    """Whether all entries of each of `count` layers are finite, (count)."""
    return torch.linalg.vector_norm(tensor.reshape(count, -1), torch.inf, dim=1).isfinite()


def _average(average: Tensor, new: Tensor | float, decay: float, fits: Tensor) -> None:
    fits = fits.reshape(-1, *(1 for _ in average.shape[1:]))
    average.lerp_(torch.where(fits, new, average).to(average.dtype), 1.0 - decay)
