"""Moving averages of curvature, which nothing that is not finite can enter.

Each has the weight of what it holds beside it, so that averages / weight are debiased; nothing
is read on the host.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
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
    new = {"A": factors.A, "G": factors.G}
    _average([(state[key], value, fits) for key, value in new.items()], decay)
    _average_weights([(state["weight"], fits)], decay)


def update_moments(states: Sequence[State], moments: Sequence[Tensor], decay: float) -> None:
    """The same for second moments in the eigenbasis, of several states at once."""
    weights = [state["moments_weight"] for state in states]
    fits = [_finite(new, len(w)) for new, w in zip(moments, weights, strict=True)]
    _average(list(zip([s["moments"] for s in states], moments, fits, strict=True)), decay)
    _average_weights(list(zip(weights, fits, strict=True)), decay)


def _finite(tensor: Tensor, count: int) -> Tensor:
    """Whether all entries of each of `count` layers are finite, (count)."""
    return torch.linalg.vector_norm(tensor.reshape(count, -1), torch.inf, dim=1) < torch.inf


def _average(parts: Sequence[tuple[Tensor, Tensor, Tensor]], decay: float) -> None:
    """Of averages, what is new, and whether it fits."""
    new = [
        torch.where(fits.reshape(-1, *(1 for _ in average.shape[1:])), new, average)
        for average, new, fits in parts
    ]
    averages = [average for average, _, _ in parts]
    ends = [end.to(average.dtype) for end, average in zip(new, averages, strict=True)]
    torch._foreach_lerp_(averages, ends, 1.0 - decay)


def _average_weights(parts: Sequence[tuple[Tensor, Tensor]], decay: float) -> None:
    """Of weights, and whether what is new fits."""
    ends = [weight.masked_fill(fits, 1.0) for weight, fits in parts]
    torch._foreach_lerp_([weight for weight, _ in parts], ends, 1.0 - decay)
