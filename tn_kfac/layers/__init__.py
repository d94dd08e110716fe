"""Layers whose weights have Kronecker factors, found by the module's type."""

from tn_kfac.layers import conv, linear
from tn_kfac.layers.base import Layer, layer_of

__all__ = ["Layer", "conv", "layer_of", "linear"]
