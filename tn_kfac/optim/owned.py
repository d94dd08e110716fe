"""A step of which some rank does each layer's part for all ranks, its owner.

What owners send is either what preconditions ("inverses", "factors"), so that the states of all
ranks are the same, or what was preconditioned ("gradients").
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tn_kfac.optim.base import KroneckerOptimizer
from tn_kfac.optim.binding import Active, Binding
from tn_kfac.optim.groups import Group
from tn_kfac.optim.owners import Owners
from tn_kfac.optim.ranks import from_owners
from tn_kfac.optim.updates import lengthened

State = dict[str, Any]
META = torch.device("meta")


class OwnedOptimizer(KroneckerOptimizer):
    """An optimizer whose ranks share the work for layers out among them.

    Where owners keep what preconditions a layer ("gradients"), a checkpoint of a rank holds what
    that rank keeps. A layer whose owner finds nothing of it in the checkpoint that it loads (of
    another rank, or of another number of ranks) begins with new inverses.
    """

    _owners: Owners

    @property
    def sharing(self) -> Any:
        """What ranks send each other beside statistics; False: nothing."""
        return self._owners.sharing

    @abstractmethod
    def _fresh(self, binding: Binding, state: State, group: Group, device: torch.device) -> State:
        """What of a layer's new state its owner computes, as it is until then."""

    def _begin_anew(self, state: State) -> None:
        """Have a layer's owner compute it as soon as it can."""

    def _keeps(self, binding: Binding) -> bool:
        """Whether this rank keeps what the owner of a layer computes."""
        return not self._owners.apart or self._owners.works(binding, self._bindings)

    def _owned_state(
        self, binding: Binding, state: State, group: Group, device: torch.device
    ) -> State:
        """What is in a layer's new state of that, and who its owner is if others keep nothing."""
        owner = {"owner": self._owners.of(binding, self._bindings)} if self._owners.apart else {}
        return owner | (self._fresh(binding, state, group, device) if self._keeps(binding) else {})

    def _directions(self, active: Sequence[Active]) -> dict[Tensor, Tensor]:
        if not self._owners.apart:
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
        """Restore a state, and of what owners compute what this rank keeps.

        Raises:
            ValueError: If the state belongs to another model or other structures; nothing
                is changed then.
        """
        super().load_state_dict(state_dict)
        where = self._where()
        for binding in self._bindings:
            p = binding.parameters[0]
            if "step" in self.state[p]:
                self._settle(binding, self.param_groups[where[p]])

    def _settle(self, binding: Binding, group: Group) -> None:
        """After loading: what an owner computes, if this rank keeps it; anew if it has none."""
        p = binding.parameters[0]
        state = self.state[p]
        scattered = state.pop("owner", None) is not None
        if self._owners.apart:
            state["owner"] = self._owners.of(binding, self._bindings)
            keys = self._fresh(binding, state, group, META).keys()
            if not self._keeps(binding):
                for key in keys & state.keys():
                    del state[key]
                return
            scattered = not keys <= state.keys()
        if scattered:
            state |= self._fresh(binding, state, group, p.device)
            self._begin_anew(state)
