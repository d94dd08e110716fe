"""Statistics of a layer with diagonal factors, by one kernel where it runs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from tn_kfac.curvature.statistics import Recipe
from tn_kfac.kernels.available import available
from tn_kfac.kernels.diagonals import Call, Request, prepared
from tn_kfac.kernels.diagonals_launch import COUNTERS
from tn_kfac.layers.base import Saved

KEPT = 256
"""Calls of different shapes that a layer remembers."""


class _Known(NamedTuple):
    """How the kernel is called for tensors of some shapes.

    Attributes:
        call: The call.
        counters: The zeros that it counts in.
        as_they_are: Whether the pixels lie in memory as the tensors do, which are taken then:
            views of them would be made for each call.
    """

    call: Call
    counters: Tensor
    as_they_are: bool


class PackedStatistics:
    """Forms the vector (A, G, counts) of one layer's calls.

    It keeps the zeros that the kernel counts in, so that calls of different layers may run at
    the same time; and how the kernel is called for tensors of the shapes that it has seen.
    """

    def __init__(self, recipe: Recipe, dtype: torch.dtype) -> None:
        self.recipe = recipe
        self.dtype = dtype
        self._counters: dict[torch.device, Tensor] = {}
        self._calls: dict[Hashable, _Known | None] = {}

    def __call__(self, saved: Saved, gradient: Tensor, first_use: bool, turn: int) -> Tensor | None:
        """The vector of one call, None where the kernel does not do it (see `statistics`)."""
        if not saved:
            return None
        whole, share = gradient.shape, 1.0
        if self.recipe.every != 1:
            saved, gradient, share = self.recipe.thinned(saved, gradient, turn)
        x = saved[0]  # the share says how many samples there were
        key = (first_use, share, x.shape, x.stride(), x.dtype, gradient.shape, gradient.stride(),
               gradient.dtype, gradient.device)  # fmt: skip
        known = self._calls.get(key)
        if known is None and key not in self._calls:
            if len(self._calls) == KEPT:
                self._calls.clear()
            terms = self.recipe.terms(whole, first_use)
            known = self._calls[key] = self._known(saved, gradient, terms, share)
        if known is None:
            return None
        if known.as_they_are:
            return known.call(x, gradient, known.counters)
        pixels = self.recipe.layer.pixels(saved, gradient)
        assert pixels is not None
        return known.call(*pixels, known.counters)

    def _known(self, saved: Saved, gradient: Tensor, terms: int, share: float) -> _Known | None:
        """How the kernel is called for such tensors."""
        recipe, device = self.recipe, gradient.device
        if self.dtype != torch.float32 or not available(device):
            return None
        pixels = recipe.layer.pixels(saved, gradient)
        if pixels is None:
            return None
        x, v = pixels
        axes, reduce = recipe.layer.windows(x.shape), recipe.approx == "reduce"
        groups, bias = recipe.layer.groups, recipe.has_bias
        call = prepared(x, v, Request(axes, groups, reduce, bias, float(terms), share))
        if call is None:
            return None
        if device not in self._counters:
            self._counters[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        pairs = ((x, saved[0]), (v, gradient))
        lie_so = all(a.data_ptr() == b.data_ptr() and a.dtype == b.dtype for a, b in pairs)
        return _Known(call, self._counters[device], lie_so)
