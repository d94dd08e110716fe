"""Parameter groups: which rule trains which parameter.

A group that a user gives is split in two: parameters with Kronecker factors, and the
rest, which follows a fallback rule with a learning rate and weight decay of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from tn_kfac.curvature import Site
from tn_kfac.optim.rules import FALLBACK_EXTRAS

COMMON_KEYS = (
    "lr", "momentum", "weight_decay", "nesterov", "average_momentum", "decoupled_weight_decay"
)  # fmt: skip
Group = dict[str, Any]


def as_groups(params: Any) -> list[Group]:
    """What torch optimizers accept as `params`, as a list of groups.

    Raises:
        TypeError: If `params` is a lone tensor, or nothing that holds any.
        ValueError: If `params` is empty, or a group has none.
    """
    wanted = "params must be an iterable of tensors or dicts"
    if isinstance(params, Tensor):
        raise TypeError(f"{wanted}, got a tensor: wrap it")
    if not isinstance(params, Iterable):
        raise TypeError(f"{wanted}, got {params!r}: pass model.parameters(), or nothing")
    listed = list(params)
    if not listed:
        raise ValueError("params is empty: pass a model with parameters")
    for group in listed:
        if isinstance(group, dict) and "params" not in group:
            raise ValueError(f"params has a group without 'params', {group!r}: name its tensors")
    return listed if isinstance(listed[0], dict) else [{"params": listed}]


def parameter(entry: Any) -> Any:
    """The parameter of an entry, which may be a (name, parameter) pair."""
    return entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry


def entries_of(params: Any) -> list[Any]:
    """The entries of a group's `params`: one tensor, or an ordered collection.

    Raises:
        TypeError: If the collection is a set, whose order changes between runs.
    """
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, (set, frozenset)):
        raise TypeError("params must be ordered, got a set: pass a list")
    return list(params)


def check_entries(entries: Iterable[Any], known: set[Parameter], present: set[Tensor]) -> None:
    """Check that entries are parameters of the model, each listed once.

    Raises:
        TypeError: If an entry is not a tensor.
        ValueError: If it is not in `known`, or already in `present`.
    """
    seen = set(present)
    for entry in map(parameter, entries):
        if not isinstance(entry, Tensor):
            raise TypeError(f"params must hold tensors, got {type(entry).__name__}")
        if entry not in known:
            raise ValueError(
                f"params holds a tensor of shape {tuple(entry.shape)} that is not a parameter of "
                "model: pass parameters of the same model object"
            )
        if entry in seen:
            raise ValueError(
                f"params holds a parameter of shape {tuple(entry.shape)} more than once (or the "
                "optimizer has it already): list each parameter in one group only"
            )
        seen.add(entry)


def has_factors(entry: Any, sites: Mapping[Any, Site]) -> bool:
    """Whether a parameter gets Kronecker factors.

    A frozen parameter beside a trained one of the same layer does not: should it be
    unfrozen later, the fallback trains it.
    """
    param = parameter(entry)
    if param not in sites:
        return False
    return param.requires_grad or not any(p.requires_grad for p in sites[param].parameters)


def split(given: Group, options: Group, sites: Mapping[Any, Site], rule: str) -> list[Group]:
    """The groups, each with one rule, that a checked user's group becomes.

    `options` holds the user's group over the optimizer's defaults.
    """
    entries = entries_of(given["params"])
    factored = [entry for entry in entries if has_factors(entry, sites)]
    others = [entry for entry in entries if not has_factors(entry, sites)]
    extras = {key: value for key, value in given.items() if key not in options}
    groups = []
    if factored:
        kept = {key: v for key, v in options.items() if not key.startswith("fallback")}
        groups.append(extras | kept | {"rule": rule, "params": factored})
    if others and options["fallback"] is not None:
        groups.append(extras | _fallback_options(given, options) | {"params": others})
    return groups


def _fallback_options(given: Group, options: Group) -> Group:
    """Fallback options; what a user's group says of lr and weight decay comes first."""
    rule = options["fallback"]
    group = {key: options[key] for key in COMMON_KEYS} | FALLBACK_EXTRAS[rule]
    for key in ("lr", "weight_decay"):
        own = options[f"fallback_{key}"]
        if own is not None and (key not in given or f"fallback_{key}" in given):
            group[key] = own
    return group | {"rule": rule}


def untrained(groups: Iterable[Group], named: Iterable[tuple[str, Parameter]]) -> list[str]:
    """Names of trainable parameters that no group holds."""
    held = {parameter(entry) for group in groups for entry in group["params"]}
    return [name for name, p in named if p.requires_grad and p not in held]


def warn_untrained(names: list[str]) -> None:
    """Say once which parameters will not be trained."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    warnings.warn(
        f"{len(names)} parameters have no Kronecker factor and will not be trained ({shown}): "
        "choose fallback='sgd' or fallback='adamw' to train them",
        stacklevel=5,
    )
