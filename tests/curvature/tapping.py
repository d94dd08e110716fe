"""Taps on bare layers, as the optimizers install them."""

from typing import Any

import torch
from torch import nn

from tn_kfac.curvature import LayerTap, Recipe
from tn_kfac.layers import Layer, layer_of
from tn_kfac.structures import structure


def tapped(
    *modules: nn.Module,
    approx: Any = "expand",
    loss_average: Any = "batch",
    structures: tuple[str, str] = ("dense", "dense"),
    dtype: torch.dtype = torch.float64,
    fisher: Any = "empirical",
) -> LayerTap:
    """One tap on modules that share their parameters; frozen parameters are left out."""
    first = modules[0]
    layer = layer_of(first)
    assert isinstance(layer, Layer)
    recipe = Recipe(
        layer,
        has_weight=first.weight.requires_grad,
        has_bias=getattr(first, "bias", None) is not None and first.bias.requires_grad,
        approx=approx,
        loss_average=loss_average,
        structures=(structure(structures[0]), structure(structures[1])),
        fisher=fisher,
    )
    tap = LayerTap(recipe, dtype)
    for module in modules:
        module.register_forward_hook(tap, with_kwargs=True)
    return tap
