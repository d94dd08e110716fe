"""Loss scales: what a GradScaler that calls `step` has to do with curvature.

torch's scaler hands its scale and what it found to an optimizer that declares
`_step_supports_amp_scaling`, as the attributes `grad_scale` and `found_inf`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def unscale(optimizer: Optimizer, needed: bool) -> Tensor | None:
    """Unscale the gradients of a scaler's step; returns the scale, None if there is none.

    Args:
        optimizer: The optimizer that is stepped.
        needed: Whether curvature came with the scaled gradients.

    Raises:
        RuntimeError: If the scale is needed, but the gradients are unscaled already.
    """
    if getattr(optimizer, "found_inf", None) is None:
        return None
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        for p in _parameters(optimizer.param_groups):
            if p.grad is not None:
                p.grad.div_(scale)
    elif needed:
        for name in ("found_inf", "grad_scale"):  # the scaler would, had we returned
            delattr(optimizer, name)
        raise RuntimeError(
            "scaler.unscale_(optimizer) hides the loss scale, which the curvature needs too: "
            "drop that call (and clip with a scaled threshold), use bfloat16 autocast, which "
            "needs no GradScaler, or another Fisher than the empirical one"
        )
    return scale


def _parameters(groups: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    return (p for group in groups for p in group["params"])


def found_inf(optimizer: Optimizer) -> bool:
    """Whether a scaler that calls this step met a non-finite gradient."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
