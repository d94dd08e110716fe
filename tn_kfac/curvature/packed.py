"""Statistics of a layer with diagonal factors, by one kernel where it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from tn_kfac.curvature.statistics import Recipe
from tn_kfac.kernels.available import available
from tn_kfac.kernels.diagonals import COUNTERS, Request, diagonals
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
        terms = float(recipe.terms(gradient.shape, first_use))
        saved, gradient, share = recipe.thinned(saved, gradient, turn)
        windows = recipe.layer.windows(saved, gradient)
        if windows is None:
            return None
        x, axes, v = windows
        reduce, bias = recipe.approx == "reduce", recipe.has_bias
        request = Request(axes, recipe.layer.groups, reduce, bias, terms, share)
        if self._counters is None or self._counters.device != x.device:
            self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
        return diagonals(x, v, request, self._counters)
