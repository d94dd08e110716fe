"""Forward passes of a model: where they begin and end, and whose samples they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from tn_kfac.curvature.tap import LayerTap


class Samples:
    """The samples of one forward pass: counted by whichever call's backward runs first."""

    def __init__(self) -> None:
        self.counted_in = -1
        self.measured_in = -1
        self.terms: Tensor | float = 0.0

    def count_once(self, epoch: int) -> bool:
        """Whether they are still to be counted in the epoch (between two `clear`)."""
        first = self.counted_in != epoch
        self.counted_in = epoch
        return first


class ForwardScope:
    """Hooks on the model that tell its layers when a forward pass begins and ends.

    A layer that is called twice in one forward pass sees each sample twice, but the
    loss still averages over each sample once. Outside of a forward pass of the model
    (its parts called one by one) every call counts its samples.
    """

    def __init__(self, taps: Sequence[LayerTap]) -> None:
        self.taps = list(taps)

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Install the hooks."""
        return [
            model.register_forward_pre_hook(_ScopeHook(self, begins=True)),
            model.register_forward_hook(_ScopeHook(self, begins=False), always_call=True),
        ]

    def mark(self, tracked: bool) -> None:
        """Begin (or end) a forward pass: no layer has been called yet."""
        compiling = torch.compiler.is_compiling()
        for tap in self.taps:
            tap.called = False
            if compiling:  # counted while tracing
                tap.scope = tap.traced if tracked else None
            else:
                tap.scope = Samples() if tracked else None
                tap.latest = tap.scope or tap.latest


class _ScopeHook:
    """One hook of a `ForwardScope`."""

    def __init__(self, scope: ForwardScope, begins: bool) -> None:
        self.scope = scope
        self.begins = begins

    def __call__(self, *_: Any) -> None:
        self.scope.mark(self.begins)

    def __deepcopy__(self, memo: dict[int, Any]) -> InertHook:
        return InertHook()

    def __reduce__(self) -> tuple[type[InertHook], tuple[()]]:
        return InertHook, ()


class InertHook:
    """What a hook becomes in a copied or unpickled model: nothing happens."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""
