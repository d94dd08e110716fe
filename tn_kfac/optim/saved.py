"""What of a Kronecker-factored optimizer is saved: the states of its layers and parameters."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from tn_kfac.optim import checkpoint
from tn_kfac.optim.binding import Active, Binding
from tn_kfac.optim.groups import Group
from tn_kfac.optim.hooked import HookedOptimizer


class SavedOptimizer(HookedOptimizer):
    """A hooked optimizer whose layers have a state, which is checked before it is restored."""

    built_in: ClassVar[tuple[str, ...]]
    factor_names: ClassVar[tuple[str, str]]

    @abstractmethod
    def _new_state(self, binding: Binding, group: Group, device: torch.device) -> dict[str, Any]:
        """Fresh factors of a layer."""

    @abstractmethod
    def _tell(self, layer: Active) -> None:
        """Tell a layer's tap what the next backward pass measures."""

    def _where(self) -> dict[int, int]:
        """The number of each parameter's group, by its identity (a tensor takes long to hash)."""
        return {id(p): number for number, g in enumerate(self.param_groups) for p in g["params"]}

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors and numbers, none of them shared with the optimizer.

        Callables among the hyper-parameters (a scheduled `lr_cov`) are not stored.
        """
        return checkpoint.detached(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; factors keep the dtype that they were saved in.

        Raises:
            ValueError: If the state belongs to another model or other structures; nothing
                is changed then.
        """
        expected = self._expected_shapes()
        checkpoint.check_compatible(state_dict, self.param_groups, expected, self.factor_names)
        checkpoint.check_options(state_dict, self.param_groups, self.built_in)
        state_dict = self._own_part(state_dict)
        callables = [{k: v for k, v in g.items() if callable(v)} for g in self.param_groups]
        super().load_state_dict(checkpoint.detached(state_dict))
        checkpoint.restore_dtypes(state_dict, self.param_groups, self.state)
        for group, kept in zip(self.param_groups, callables, strict=True):
            group |= {key: value for key, value in kept.items() if group.get(key) is None}
        where = self._where()
        for binding in self._bindings:
            numbers = [where[id(p)] for p in binding.parameters]
            group, state = self.param_groups[numbers[0]], self.state[binding.parameters[0]]
            self._tell(Active(binding, group, state, numbers))

    def _own_part(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What this rank loads of a state."""
        return state_dict

    def _expected_shapes(self) -> dict[Tensor, dict[str, torch.Size]]:
        """Shapes of the factors of each layer, by the parameter that owns them."""
        meta = torch.device("meta")
        where, groups = self._where(), self.param_groups
        fresh = {
            b.parameters[0]: self._new_state(b, groups[where[id(b.parameters[0])]], meta)
            for b in self._bindings
        }
        return {
            parameter: {key: v.shape for key, v in state.items() if isinstance(v, Tensor)}
            for parameter, state in fresh.items()
        }
