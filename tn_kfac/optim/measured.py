"""Curvature that is measured apart from the gradients of the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

from tn_kfac.curvature import LayerTap
from tn_kfac.curvature.tap import OF_THE_LOSS
from tn_kfac.optim.binding import Active, Binding
from tn_kfac.optim.sharded import own


def measured_apart(bindings: Iterable[Binding]) -> list[list[LayerTap]]:
    """The taps of the last forward pass that wait for it, those of one Fisher together."""
    kinds: dict[str, list[LayerTap]] = {}
    for tap in (binding.tap for binding in bindings):
        if tap.recipe.fisher not in OF_THE_LOSS and tap.enabled and tap.probes:
            kinds.setdefault(tap.recipe.fisher, []).append(tap)
    return list(kinds.values())


def check_measured(active: Sequence[Active], is_due: Callable[[Active], bool]) -> None:
    """Check that no layer whose factors are due waits for curvature in vain.

    Warns if it should have come with the gradients of the loss.

    Raises:
        RuntimeError: If nothing was measured since the last step, and a call was forgotten.
    """
    waiting = []
    for layer in active:
        tap = layer.binding.tap
        if tap.enabled and is_due(layer):  # off, if an interval has just been shortened
            if tap.has_statistics:
                return
            waiting.append(tap)
    grads = (p.grad for layer in active for p in layer.binding.parameters)
    if not waiting or not any(own(grad).any() for grad in grads if grad is not None):
        return  # torch.distributed.checkpoint makes states by a step along zero gradients
    apart = [tap.recipe.fisher for tap in waiting if tap.recipe.fisher not in OF_THE_LOSS]
    if apart:
        raise RuntimeError(
            f"fisher={apart[0]!r} has no curvature for this step: call "
            "optimizer.curvature(outputs, loss, targets) between forward and backward"
        )
    warnings.warn(
        "no layer captured curvature since the last step, so the factors stay as they are: use "
        "loss.backward() (without inputs=) on a forward pass of this model",
        stacklevel=5,
    )
