"""Taps on bare layers, as the optimizers install them."""

from typing import Any

import torch
from torch import nn

from tn_kfac.curvature import LayerTap, Recipe
from tn_kfac.layers import Layer, layer_of
from tn_kfac.structures import structure


def recipe_of(
    module: nn.Module,
    approx: Any = "expand",
    loss_average: Any = "batch",
    structures: tuple[str, str] = ("dense", "dense"),
    fisher: Any = "empirical",
) -> Recipe:
    """What is measured of a layer; frozen parameters are left out."""
    layer = layer_of(module)
    assert isinstance(layer, Layer)
    bias: Any = getattr(module, "bias", None)
    weight: Any = module.weight
    return Recipe(
        layer,
        has_weight=weight.requires_grad,
        has_bias=bias is not None and bias.requires_grad,
        approx=approx,
        loss_average=loss_average,
        structures=(structure(structures[0]), structure(structures[1])),
        fisher=fisher,
    )


def tapped(*modules: nn.Module, dtype: torch.dtype = torch.float64, **choices: Any) -> LayerTap:
    """One tap on modules that share their parameters; choices are those of `recipe_of`."""
    tap = LayerTap(recipe_of(modules[0], **choices), dtype)
    for module in modules:
        module.register_forward_hook(tap, with_kwargs=True)
    return tap
