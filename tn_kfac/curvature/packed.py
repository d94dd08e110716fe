"""Statistics of a layer with diagonal factors, by one kernel where it runs."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from tn_kfac.curvature.statistics import Recipe
from tn_kfac.kernels.available import available
from tn_kfac.kernels.diagonals import Call, Request, prepared
from tn_kfac.kernels.diagonals_launch import COUNTERS
from tn_kfac.layers.base import Saved

KEPT = 256
"""Calls of different shapes that a layer remembers."""


class PackedStatistics:
    """Forms the vector (A, G, counts) of one layer's calls.

    It keeps the zeros that the kernel counts in, so that calls of different layers may run at
    the same time; and how the kernel is called for tensors of the shapes that it has seen.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._counters: Tensor | None = None
        self._calls: dict[Hashable, Call | None] = {}

    def __call__(
        self, saved: Saved, gradient: Tensor, dtype: torch.dtype, first_use: bool, turn: int
    ) -> Tensor | None:
        """The vector of one call, None where the kernel does not do it (see `statistics`)."""
        recipe, device = self.recipe, gradient.device
        if dtype != torch.float32 or not recipe.has_weight or not available(device):
            return None
        whole = gradient.shape
        saved, gradient, share = recipe.thinned(saved, gradient, turn)
        pixels = recipe.layer.pixels(saved, gradient)
        if pixels is None:
            return None
        x, v = pixels
        key = (first_use, share, whole, x.shape, x.stride(), x.dtype, v.shape, v.stride(), v.dtype,
               device)  # fmt: skip
        call = self._calls.get(key)
        if call is None and key not in self._calls:
            if len(self._calls) == KEPT:
                self._calls.clear()
            call = self._calls[key] = self._call(x, v, recipe.terms(whole, first_use), share)
        if call is None:
            return None
        if self._counters is None or self._counters.device != device:
            self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        return call(x, v, self._counters)

    def _call(self, x: Tensor, v: Tensor, terms: int, share: float) -> Call | None:
        """How the kernel is called for such tensors."""
        recipe = self.recipe
        axes, reduce = recipe.layer.windows(x.shape), recipe.approx == "reduce"
        groups, bias = recipe.layer.groups, recipe.has_bias
        return prepared(x, v, Request(axes, groups, reduce, bias, float(terms), share))
