"""Layers whose weights have Kronecker factors, found by the module's type."""

from tn_kfac.layers import conv, conv_transpose, embedding, linear, norm
from tn_kfac.layers.base import Ask, Cost, Layer, Refused, layer_named, layer_of, overrides
from tn_kfac.layers.rows import RowLayer

__all__ = [
    "Ask",
    "Cost",
    "Layer",
    "Refused",
    "RowLayer",
    "conv",
    "conv_transpose",
    "embedding",
    "layer_named",
    "layer_of",
    "linear",
    "norm",
    "overrides",
]
