"""Checks of hyper-parameters; each error names the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def interval(name: str, value: object) -> None:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


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


def structure_pair(value: Any) -> tuple[str, str]:
    """The names of the structures for the input and the output factor."""
    first, second = (structure(spec).name for spec in pair("structure", value))
    return first, second


def dtype_pair(value: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes of the input and the output factor; None chooses by the parameter."""
    dtypes = pair("preconditioner_dtype", value)
    for dtype in dtypes:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"preconditioner_dtype must be a torch dtype or None, got {dtype!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"preconditioner_dtype must be a floating-point dtype, got {dtype}")
    return dtypes


Check = Callable[[str, object], None]

COMMON: dict[str, Check] = {
    "lr": number,
    "momentum": lambda name, value: number(name, value, below=1.0),
    "weight_decay": number,
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
