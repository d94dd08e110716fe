"""An optimizer whose diagonal factors are updated and used in a few launches, where that can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from tn_kfac.optim.binding import Active
from tn_kfac.optim.fused import Fused, Member
from tn_kfac.optim.groups import Group
from tn_kfac.optim.shared_updates import SharedUpdates


class FusedOptimizer(SharedUpdates):
    """An optimizer that updates and uses diagonal factors as SINGD does, at once where it can."""

    _fused: Fused

    def _take_in(self, measured: Sequence[Active], scale: Tensor | None) -> None:
        """All layers that `Fused` knows at once, the others one after another."""
        rest, betas = [], {}
        alike: dict[tuple[int, float], list[Active]] = defaultdict(list)
        for layer in measured:
            binding, group, state, numbers = layer
            starts = group["init"] == "curvature" and not state.get("started")
            if starts or not self._fused.takes_factors(binding, state):
                rest.append(layer)
                continue
            self._sums.arrive(binding.tap)
            time = (numbers[0], state["step"])
            if time not in betas:
                betas[time] = self._beta(state, group)
            alike[numbers[0], betas[time]].append(layer)
        for (_, beta), layers in alike.items():
            self._fused.update(layers, beta, scale)
            for layer in layers:
                self._count_update(layer.state, layer.group)
        super()._take_in(rest, scale)

    def _step_layers(self, active: Sequence[Active], counted: Sequence[bool]) -> None:
        rest, waits = [], []
        eager = not torch.compiler.is_compiling()
        taken = [eager and self._fused.takes_group(group) for group in self.param_groups]
        layers: list[tuple[Active, list[Member]]] = []
        for layer, counts in zip(active, counted, strict=True):
            ready = layer.state["step"] >= layer.group["warmup"]
            for number in layer.numbers:
                ready = ready and taken[number]
            found = self._fused.weights(layer) if ready else None
            if found is None:
                rest.append(layer)
                waits.append(counts)
                continue
            layers.append((layer, found))
            self._count_step(layer, counts)
        super()._step_layers(rest, waits)
        self._fused.step(layers, self.param_groups, self.state)

    def _write(self, group: Group, directions: dict[Tensor, Tensor]) -> None:
        members = self._fused.without_factors(group) if group["rule"] != self.rule else None
        if members is None:
            super()._write(group, directions)
        elif members:
            self._fused.step_plain(members, group, self.state)
