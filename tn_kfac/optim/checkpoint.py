"""Checkpoints: plain, unaliased, in the dtypes that they were taken in.

torch casts loaded state to the parameter's dtype, which would truncate float32 factors
of bfloat16 weights; the functions here put the saved dtypes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def detached(value: Any) -> Any:
    """A copy that shares nothing: tensors cloned, containers rebuilt, callables None."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: detached(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(detached(entry) for entry in value)
    return None if callable(value) else value


def check_compatible(
    state_dict: Mapping[str, Any],
    groups: list[dict[str, Any]],
    expected: Mapping[Tensor, Mapping[str, torch.Size]],
    required: tuple[str, ...],
) -> None:
    """Check that a saved state fits the optimizer's groups and factors.

    Raises:
        ValueError: If groups, rules or shapes differ.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            "state_dict must hold 'state' and 'param_groups': pass one of state_dict()"
        )
    saved_groups = state_dict["param_groups"]
    saved, own = ([(g.get("rule"), len(g["params"])) for g in gs] for gs in (saved_groups, groups))
    if saved != own:
        raise ValueError(
            f"state_dict has the groups (rule, parameters) {saved}, this optimizer {own}: build "
            "the optimizer as it was built for the checkpoint"
        )
    for name, param, state in _matched(state_dict, groups):
        for key, shape in expected.get(param, {}).items():
            if (key not in state and key in required) or "step" not in state:
                missing = key if key not in state else "step"
                raise ValueError(f"state_dict holds no {missing} for parameter {name}")
            if key in state and tuple(state[key].shape) != tuple(shape):
                raise ValueError(
                    f"state_dict holds {key} of shape {tuple(state[key].shape)} for parameter "
                    f"{name}, expected {tuple(shape)}: use the model and the structure of the "
                    "checkpoint"
                )


def check_options(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], keys: tuple[str, ...]
) -> None:
    """Check the options that the capture was built with.

    Raises:
        ValueError: If one differs.
    """
    for at, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for key in keys:
            ours, theirs = group.get(key), saved.get(key)
            if ours != (tuple(theirs) if isinstance(theirs, list) else theirs):
                raise ValueError(
                    f"state_dict has {key}={theirs!r} in group {at}, this optimizer {ours!r}: "
                    f"build the optimizer with the {key} of the checkpoint"
                )


def restore_dtypes(
    state_dict: Mapping[str, Any], groups: list[dict[str, Any]], live: Mapping[Tensor, Any]
) -> None:
    """Put every saved tensor back in the dtype it was saved in."""
    for _, param, state in _matched(state_dict, groups):
        for key, value in state.items():
            if isinstance(value, Tensor) and live[param][key].dtype != value.dtype:
                live[param][key] = value.detach().clone().to(param.device)


def _matched(state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> Any:
    """(description, parameter, saved state) of each parameter with a saved state."""
    for at, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for index, (key, param) in enumerate(zip(saved["params"], group["params"], strict=True)):
            if key in state_dict["state"]:
                name = f"{index} of group {at}, shape {tuple(param.shape)}"
                yield name, param, state_dict["state"][key]
