"""Structured matrix spaces for Kronecker factors."""

from __future__ import annotations

from tn_kfac.structures.base import Structure
from tn_kfac.structures.dense import Dense
from tn_kfac.structures.diagonal import Diagonal

__all__ = ["Dense", "Diagonal", "Structure", "structure"]

_BY_NAME: dict[str, Structure] = {spec.name: spec for spec in (Dense(), Diagonal())}


def structure(spec: str | Structure) -> Structure:
    """The structure that `spec` names, or is.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If `spec` is neither a string nor a structure.
    """
    if isinstance(spec, Structure):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"structure must be a string or a Structure, got {spec!r}")
    if spec not in _BY_NAME:
        raise ValueError(f"structure={spec!r} is unknown: choose one of {sorted(_BY_NAME)}")
    return _BY_NAME[spec]
