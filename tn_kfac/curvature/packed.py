"""Statistics of a layer with diagonal factors, by one kernel where it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from tn_kfac.curvature.statistics import Recipe
from tn_kfac.kernels.diagonals import COUNTERS, Request, diagonals
from tn_kfac.kernels.singd import available
from tn_kfac.layers.base import Saved


class PackedStatistics:
    """Forms the vector (A, G, counts) of one layer's calls.

    It keeps the zeros that the kernel counts in, so that calls of different layers may run at
    the same time.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._counters: Tensor | None = None

    def __call__(
        self, saved: Saved, gradient: Tensor, dtype: torch.dtype, first_use: bool, turn: int
    ) -> Tensor | None:
        """The vector of one call, None where the kernel does not do it (see `statistics`)."""
        recipe = self.recipe
        if dtype != torch.float32 or not recipe.has_weight or not available(gradient.device):
            return None
        layer = recipe.layer
        samples, positions = layer.counts(gradient.shape)
        scale = 1.0
        terms = samples * positions if recipe.loss_average == "batch+sequence" else samples
        if recipe.every > 1 and samples:
            start = turn % min(recipe.every, samples)
            saved, gradient = layer.thinned(saved, gradient, start, recipe.every)
            measured, _ = layer.counts(gradient.shape)
            scale = samples / measured if measured else 1.0
        windows = layer.windows(saved, gradient)
        if windows is None:
            return None
        x, axes, v = windows
        counted = first_use and recipe.fisher == "empirical"
        request = Request(axes, layer.groups, recipe.approx == "reduce", recipe.has_bias,
                          float(terms if counted else 0), scale)  # fmt: skip
        if self._counters is None or self._counters.device != x.device:
            self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
        return diagonals(x, v, request, self._counters)
