"""Loss scales: what a GradScaler that calls `step` has to do with curvature.

torch's scaler hands its scale and what it found to an optimizer that declares
`_step_supports_amp_scaling`, as the attributes `grad_scale` and `found_inf`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tn_kfac.optim.sharded import own


def unscale(optimizer: Optimizer, needed: bool) -> Tensor | None:
    """Unscale the gradients of a scaler's step; returns the scale, None if there is none.

    Args:
        optimizer: The optimizer that is stepped.
        needed: Whether curvature came with the scaled gradients.

    Raises:
        RuntimeError: If the scale is needed and gradients are unscaled already, but no scaler
            of torch's calls this step.
    """
    if getattr(optimizer, "found_inf", None) is None:
        return None
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        grads = [own(p.grad) for p in _parameters(optimizer.param_groups) if p.grad is not None]
        if grads:
            torch._foreach_div_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]
        return scale
    scaler = _calling_scaler() if needed else None
    if needed and scaler is None:
        for name in ("found_inf", "grad_scale"):  # the scaler would, had we returned
            delattr(optimizer, name)
        raise RuntimeError(
            "the gradients are unscaled already, and the scaler that calls step is none of "
            "torch.amp.GradScaler: the curvature needs its scale too. Drop unscale_, use bfloat16 "
            "autocast, which needs no scaler, or another Fisher than the empirical one"
        )
    return None if scaler is None else scaler._get_scale_async()


def _calling_scaler() -> GradScaler | None:
    """The scaler whose `step` calls ours: after `unscale_` it no longer hands over its scale."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, GradScaler):
            return caller
        frame = frame.f_back
    return None


def _parameters(groups: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    return (p for group in groups for p in group["params"])


def found_inf(optimizer: Optimizer) -> bool:
    """Whether a scaler that calls this step met a non-finite gradient."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
