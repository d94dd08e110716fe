"""Structured matrix spaces for Kronecker factors."""

from __future__ import annotations

import re
from collections.abc import Callable

from tn_kfac.structures.auto import Auto, Limited
from tn_kfac.structures.base import Spec, Structure
from tn_kfac.structures.block_diagonal import BlockDiagonal
from tn_kfac.structures.dense import Dense
from tn_kfac.structures.diagonal import Diagonal
from tn_kfac.structures.hierarchical import Arrow, Hierarchical
from tn_kfac.structures.toeplitz import Toeplitz

__all__ = [
    "NAMES",
    "Arrow",
    "Auto",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Hierarchical",
    "Limited",
    "Spec",
    "Structure",
    "Toeplitz",
    "structure",
]

NAMES: dict[str, Callable[..., Spec]] = {
    "dense": Dense,
    "diagonal": Diagonal,
    "auto": Auto,
    "auto<budget>": Auto,
    "dense<most>blocks": Limited,
    "dense<most>diagonal": lambda most: Limited(most, "diagonal"),
    "block<size>diagonal": BlockDiagonal,
    "hierarchical<top>_<bottom>": Hierarchical,
    "triltoeplitz": lambda: Toeplitz("lower"),
    "triutoeplitz": lambda: Toeplitz("upper"),
    "triltopleftdiag": lambda: Arrow("lower", "top-left"),
    "trilbottomrightdiag": lambda: Arrow("lower", "bottom-right"),
    "triutopleftdiag": lambda: Arrow("upper", "top-left"),
    "triubottomrightdiag": lambda: Arrow("upper", "bottom-right"),
}
"""What each name makes; <…> stands for a number, as in block30diagonal."""


def structure(spec: str | Spec) -> Spec:
    """The structure that `spec` names, or is.

    >>> structure("block30diagonal")
    BlockDiagonal(size=30)

    Raises:
        ValueError: If the name is unknown.
        TypeError: If `spec` is neither a string nor a structure.
    """
    if isinstance(spec, Spec):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"structure must be a string or a Structure, got {spec!r}")
    for name, make in NAMES.items():
        numbers = re.fullmatch(re.sub("<[a-z]+>", "([0-9]+)", name), spec)
        if numbers:
            try:
                return make(*map(int, numbers.groups()))
            except ValueError as error:
                raise ValueError(f"structure={spec!r}: {error}") from None
    raise ValueError(f"structure={spec!r} is unknown: choose one of {sorted(NAMES)}")
