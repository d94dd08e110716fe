"""Curvature that is measured apart from the gradients of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tn_kfac.curvature import LayerTap
from tn_kfac.curvature.tap import OF_THE_LOSS
from tn_kfac.optim.binding import Binding


def measured_apart(bindings: Iterable[Binding]) -> list[list[LayerTap]]:
    """The taps of the last forward pass that wait for it, those of one Fisher together."""
    kinds: dict[str, list[LayerTap]] = {}
    for tap in (binding.tap for binding in bindings):
        if tap.recipe.fisher not in OF_THE_LOSS and tap.enabled and tap.probes:
            kinds.setdefault(tap.recipe.fisher, []).append(tap)
    return list(kinds.values())


def check_measured(bindings: Iterable[Binding], is_due: Callable[[Binding], bool]) -> None:
    """Check that no layer whose factors are due waits for curvature in vain.

    Raises:
        RuntimeError: If nothing was measured since the last step.
    """
    waiting = [
        b.tap
        for b in bindings
        if b.tap.recipe.fisher not in OF_THE_LOSS
        and any(p.grad is not None for p in b.parameters)
        and is_due(b)
    ]
    if waiting and all(tap.factors() is None for tap in waiting):
        raise RuntimeError(
            f"fisher={waiting[0].recipe.fisher!r} has no curvature for this step: call "
            "optimizer.curvature(outputs, loss, targets) between forward and backward"
        )
