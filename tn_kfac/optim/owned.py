"""A step in which each layer's gradient is preconditioned by one rank alone, its owner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tn_kfac.optim import intervals
from tn_kfac.optim.base import KroneckerOptimizer
from tn_kfac.optim.binding import Active, Binding
from tn_kfac.optim.owners import Owners
from tn_kfac.optim.ranks import from_owners
from tn_kfac.optim.updates import lengthened

State = dict[str, Any]


class OwnedOptimizer(KroneckerOptimizer):
    """An optimizer that may keep what preconditions a layer on one rank, and send directions.

    A checkpoint of a rank holds what that rank keeps. A layer whose owner finds nothing of it in
    the checkpoint that it loads (of another rank, or of another number of ranks) begins with
    new inverses.
    """

    _owners: Owners

    @property
    def sharing(self) -> Any:
        """What ranks send each other: False, "inverses" or "gradients"."""
        return self._owners.sharing

    def _keeps(self, binding: Binding) -> bool:
        return self._owners.keeps(binding, self._bindings)

    def _directions(self, active: Sequence[Active]) -> dict[Tensor, Tensor]:
        if not self._owners.active:
            return super()._directions(active)
        found: dict[Tensor, Tensor] = {}
        parts: list[tuple[int | None, Tensor]] = []
        later: list[tuple[Active, Tensor | None]] = []
        for layer in active:
            owner = self._owners.of(layer.binding, self._bindings)
            if owner is None:
                found |= self._layer_directions(layer)
                continue
            matrix = self._gradient(layer)
            parts.append((owner, self._owned_direction(layer, matrix)))
            later.append((layer, matrix if layer.group["graft"] else None))
        received = from_owners(parts, self._process_group)
        for ((binding, group, state, _), matrix), direction in zip(later, received, strict=True):
            gradient = direction if matrix is None else matrix
            found |= binding.directions(lengthened(direction, gradient, state, group))
        return found

    def _owned_direction(self, layer: Active, matrix: Tensor) -> Tensor:
        """The preconditioned gradient matrix, on other ranks than its owner's memory for it."""
        dtype = torch.promote_types(matrix.dtype, layer.binding.dtypes[1])
        if not self._keeps(layer.binding):
            return torch.empty_like(matrix, dtype=dtype)
        return self._direction(layer, matrix).to(dtype)

    def load_state_dict(self, state_dict: State) -> None:
        """Restore a state, and of inverses what this rank keeps."""
        super().load_state_dict(state_dict)
        where = self._where()
        for binding in self._bindings:
            p = binding.parameters[0]
            group, state = self.param_groups[where[p]], self.state[p]
            if "step" in state:
                self._settle(binding, self._fresh(binding, state, group, p.device))

    def _settle(self, binding: Binding, fresh: State) -> None:
        """After loading: a layer's inverses, if this rank keeps them; `fresh` ones if it must."""
        state = self.state[binding.parameters[0]]
        scattered = state.pop("owner", None) is not None
        if self._owners.active:
            state["owner"] = self._owners.of(binding, self._bindings)
            if not self._keeps(binding):
                for key in fresh.keys() & state.keys():
                    del state[key]
                return
            scattered = not fresh.keys() <= state.keys()
        if scattered:
            state |= fresh
            intervals.begin_anew(state)
