"""A step of which some rank does each layer's part for all ranks, its owner.

What owners send is either what preconditions ("inverses", "factors"), so that the states of all
ranks are the same, or what was preconditioned ("gradients").
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
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

    Where owners keep what preconditions a layer ("gradients"), `state_dict` gathers it, so that a
    checkpoint is whole, whichever way its run shared work, and over however many ranks.
    """

    _owners: Owners

    @property
    def sharing(self) -> Any:
        """What ranks send each other beside statistics; False: nothing."""
        return self._owners.sharing

    @abstractmethod
    def _fresh(self, binding: Binding, state: State, group: Group, device: torch.device) -> State:
        """What of a layer's new state its owner computes, as it is until then."""

    def _keeps(self, binding: Binding) -> bool:
        """Whether this rank keeps what the owner of a layer computes."""
        return not self._owners.apart or self._owners.works(binding, self._bindings)

    def _owned_state(
        self, binding: Binding, state: State, group: Group, device: torch.device
    ) -> State:
        """What is in a layer's new state of that, on this rank."""
        return self._fresh(binding, state, group, device) if self._keeps(binding) else {}

    def _directions(self, active: Sequence[Active]) -> dict[Tensor, Tensor]:
        if not self._owners.apart:
            return super()._directions(active)
        found: dict[Tensor, Tensor] = {}
        parts: list[tuple[int | None, Tensor]] = []
        later: list[tuple[Active, Tensor | None]] = []
        ready = self._ready_gradients(active)
        for layer in active:
            owner = self._owners.of(layer.binding, self._bindings)
            if owner is None:
                found |= self._layer_directions(layer, ready)
                continue
            matrix = self._gradient(layer, ready)
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

    def state_dict(self) -> State:
        """The whole state as plain tensors and numbers, none of them shared with the optimizer.

        Callables among the hyper-parameters (a scheduled `lr_cov`) are not stored. Where owners
        keep something for themselves ("gradients"), every rank must call this, and what they keep
        is on the CPU: for a while, all of it.
        """
        found = super().state_dict()
        if self._owners.apart:
            for number, binding, group in self._numbered(found):
                if "step" in found["state"].get(number, {}):
                    found["state"][number] |= self._gathered(binding, group)
        return found

    def _numbered(self, state_dict: State) -> Iterator[tuple[int, Binding, Group]]:
        """Each layer, with the number under which a state has it, and its group."""
        of = {binding.parameters[0]: binding for binding in self._bindings}
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for number, p in zip(saved["params"], group["params"], strict=True):
                if p in of:
                    yield number, of[p], group

    def _gathered(self, binding: Binding, group: Group) -> State:
        """What the owner of a layer keeps, on the CPU of every rank."""
        p = binding.parameters[0]
        state, owner = self.state[p], self._owners.of(binding, self._bindings)
        fresh = self._fresh(binding, state, group, META)
        held = {
            key: state[key] if key in state else torch.empty_like(like, device=p.device)
            for key, like in fresh.items()
        }
        parts = [(owner, tensor) for tensor in held.values()]
        received = from_owners(parts, self._process_group)
        return {key: tensor.cpu() for key, tensor in zip(held, received, strict=True)}

    def _own_part(self, state_dict: State) -> State:
        """Of a whole state what this rank keeps."""
        if not self._owners.apart:
            return state_dict
        states = dict(state_dict["state"])
        for number, binding, group in self._numbered(state_dict):
            if number in states:
                fresh = self._fresh(binding, states[number], group, META)
                kept = {
                    key: value.to(fresh[key].dtype) if key in fresh else value  # as all expect it
                    for key, value in states[number].items()
                    if key not in fresh or self._keeps(binding)
                }
                states[number] = kept
        return {**state_dict, "state": states}
