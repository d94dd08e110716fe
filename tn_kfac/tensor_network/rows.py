"""Kronecker factors of a layer with weight sharing, from the network of its rows.

A layer that multiplies its weight matrix onto rows r[n, s, g, f] (sample n, shared
position s, channel group g, feature f) has, per group, the factors

    KFAC-expand   Σ_n Σ_s r[n, s] r[n, s]ᵀ
    KFAC-reduce   Σ_n (Σ_s r[n, s]) (Σ_s r[n, s])ᵀ

(https://arxiv.org/abs/2311.00636, Equations 19 and 21), up to a normalisation that
the caller chooses. The same holds for the rows of output gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Literal

from tn_kfac.tensor_network.network import Axes, Network, operand

Approx = Literal["expand", "reduce"]


@dataclass(frozen=True)
class Rows:
    """A network of rows and the roles of its output axes."""

    network: Network
    sample: Axes
    shared: Axes
    group: Axes
    feature: Axes

    def _count(self, axes: Axes) -> int:
        return prod(self.network.size.get(axis, 1) for axis in axes)

    @property
    def samples(self) -> int:
        """The number of samples N."""
        return self._count(self.sample)

    @property
    def positions(self) -> int:
        """The number of shared positions S of each sample."""
        return self._count(self.shared)

    def _reduced(self, approx: Approx, mean: bool) -> Network:
        """The rows that the factor is the gram of; `mean` averages shared positions."""
        if approx == "expand":
            return self.network
        scale = Fraction(1, max(1, self.positions)) if mean else Fraction(1)
        return self.network.sum(*self.shared).scaled(scale)

    def factor(self, approx: Approx, mean: bool = False, tied: Axes = ()) -> Network:
        """The factor [g, f, f'], or its diagonal in the feature axes `tied`."""
        network = self._reduced(approx, mean).gram(self.feature, keep=self.group)
        for axis in tied:
            network = network.tie(axis, f"{axis}'")
        return network

    def matrix(self, approx: Approx, mean: bool = False) -> Network:
        """The rows themselves, [g, rows, f]."""
        network = self._reduced(approx, mean)
        kept = self.sample if approx == "reduce" else self.sample + self.shared
        present = set(network.output_axes)
        roles = (
            tuple(a for a in axes if a in present) for axes in (self.group, kept, self.feature)
        )
        return network.arranged(*roles)

    def total(self, approx: Approx, mean: bool = False) -> Network:
        """The sum of all rows [g, f]: the factor's column for a bias."""
        rows = self._reduced(approx, mean)
        return rows.sum(*(a for a in rows.output_axes if a in self.sample + self.shared))


def channel_rows(name: str, batch: int, groups: int, channels: int, spatial: Sequence[int]) -> Rows:
    """The rows of a tensor (batch, groups · channels, *spatial): its channels, per group."""
    shared = tuple(f"s{dim + 1}" for dim in range(len(spatial)))
    node = operand(name, "n", ("g", "f"), *shared)
    sizes = {"n": batch, "g": groups, "f": channels} | dict(zip(shared, spatial, strict=True))
    output = (("n",), *((axis,) for axis in shared), ("g",), ("f",))
    return Rows(Network.build([node], output, sizes), ("n",), shared, ("g",), ("f",))
