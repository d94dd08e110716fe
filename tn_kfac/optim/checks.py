"""Checks of hyper-parameters; each error names the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch

from tn_kfac.optim.rules import FALLBACKS
from tn_kfac.structures import structure


def number(name: str, value: object, below: float = float("inf")) -> None:
    """A real number (or a tensor of one element) in [0, below)."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= float(value) < below:
        limit = "finite" if below == float("inf") else f"less than {below}"
        raise ValueError(f"{name} must be at least 0 and {limit}, got {value!r}")


def one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    """A member of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def interval(name: str, value: object, least: int = 1) -> None:
    """An integer of at least 1, or of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def intervals(name: str, value: object) -> None:
    """A positive integer, or a callable of the step that returns one."""
    if not callable(value):
        interval(name, value)


def optional(name: str, value: object) -> None:
    """None, or a positive number."""
    if value is None:
        return
    number(name, value)
    if not value:
        raise ValueError(f"{name} must be positive, got {value!r}: None switches it off")


def fraction(name: str, value: Any) -> int:
    """1 / n for an integer n, which is returned."""
    number(name, value)
    every = round(1 / value) if value else 0
    if every < 1 or abs(value * every - 1) > 1e-6:
        raise ValueError(f"{name} must be 1, 1/2, 1/3 and so on, got {value!r}")
    return every


def flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def schedule(name: str, value: object) -> None:
    """A number, or a callable of the step."""
    if not callable(value):
        number(name, value)


def pair(name: str, value: Any) -> tuple[Any, Any]:
    """A value for the input and one for the output factor; one value serves both."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be one value or a pair (input, output), got {value!r}")
        return value[0], value[1]
    return value, value


StructurePair = tuple[str, str]


def structures(value: Any) -> StructurePair | dict[str, StructurePair]:
    """The names of the structures for the input and the output factor.

    Of every layer; or by patterns of layer names, as in {"head": "dense", "*": "diagonal"}.

    Raises:
        ValueError: If a structure is unknown, or the mapping is empty.
        TypeError: If a structure or a pattern has the wrong type.
    """
    if not isinstance(value, Mapping):
        first, second = (structure(spec).name for spec in pair("structure", value))
        return first, second
    if not value:
        raise ValueError("structure={} names no structure: give a pattern, as in {'*': 'diagonal'}")
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"structure must have layer names as keys, got {pattern!r}")
    found = {pattern: structures(spec) for pattern, spec in value.items()}
    if any(isinstance(spec, dict) for spec in found.values()):
        raise TypeError(f"structure={value!r}: a pattern's structure cannot be a mapping")
    return found  # type: ignore[return-value]


def structures_of(name: str, chosen: StructurePair | dict[str, StructurePair]) -> StructurePair:
    """Those of the layer of the given name: of the first pattern that fits it.

    Raises:
        ValueError: If none fits.
    """
    if not isinstance(chosen, dict):
        return chosen
    for pattern, found in chosen.items():
        if fnmatchcase(name, pattern):
            return found
    raise ValueError(
        f"structure has no pattern for the layer {name!r}: add one, or '*' for all others"
    )


def dtype_pair(value: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes of the input and the output factor; None chooses by the parameter."""
    dtypes = pair("preconditioner_dtype", value)
    for dtype in dtypes:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"preconditioner_dtype must be a torch dtype or None, got {dtype!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"preconditioner_dtype must be a floating-point dtype, got {dtype}")
    return dtypes


Check = Callable[[str, Any], object]

COMMON: dict[str, Check] = {
    "lr": number,
    "momentum": lambda name, value: number(name, value, below=1.0),
    "weight_decay": number,
    "nesterov": flag,
    "average_momentum": flag,
    "decoupled_weight_decay": flag,
    "fallback": lambda name, value: one_of(name, value, (*FALLBACKS, None)),
    "fallback_lr": lambda name, value: None if value is None else number(name, value),
    "fallback_weight_decay": lambda name, value: None if value is None else number(name, value),
}


def check(options: Mapping[str, object], checks: Mapping[str, Check]) -> None:
    """Check every option that has a check.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value has the wrong type.
    """
    for name, test in checks.items():
        if name in options:
            test(name, options[name])


def damping(name: str, value: Any) -> None:
    """A number, a pair (for A, for G), or a callable of the step."""
    if isinstance(value, (tuple, list)):
        for part in pair(name, value):
            number(name, part)
    else:
        schedule(name, value)


def optional_interval(name: str, value: object) -> None:
    """None, or a positive integer."""
    if value is not None:
        interval(name, value)
