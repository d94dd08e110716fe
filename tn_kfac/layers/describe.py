"""A module's hyper-parameters in a few words."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_SIZES = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("nx", "nf"),  # HuggingFace's Conv1D
    ("num_features",),
    ("num_channels",),
    ("normalized_shape",),
    ("embed_dim",),
    ("input_size", "hidden_size"),
)
_DEFAULTS = (("stride", 1), ("dilation", 1), ("groups", 1), ("padding_mode", "zeros"))


def describe(module: nn.Module) -> str:
    """The kind of a module, its sizes, and hyper-parameters that differ from their defaults.

    >>> describe(nn.Conv2d(64, 128, 3, stride=2))
    'Conv2d 64->128, 3x3, stride 2'
    """
    names = next((names for names in _SIZES if all(hasattr(module, n) for n in names)), ())
    sizes = "->".join(_times(_values(getattr(module, name))) for name in names)
    words = [f"{type(module).__name__} {sizes}".strip()]
    if hasattr(module, "kernel_size"):
        words.append(_times(_values(module.kernel_size)))
        for name, default in _DEFAULTS:
            values = _values(getattr(module, name, default))
            if set(values) != {default}:
                words.append(f"{name} {_times(values if len(set(values)) > 1 else values[:1])}")
    return ", ".join(words)


def _values(value: object) -> tuple[object, ...]:
    """A tuple as it is, anything else as a tuple of one."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def _times(values: Iterable[object]) -> str:
    return "x".join(map(str, values))
