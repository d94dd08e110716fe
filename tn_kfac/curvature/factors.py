"""What was measured of a layer, normalised."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Factors(NamedTuple):
    """Normalised factors of a layer in the coordinates of their structures.

    A: mean of the outer products of input rows, (groups, *coordinates).
    G: sum of the outer products of output gradients, times the number of terms that
       the loss averages over: the sum, over a batch of losses ℓ_n with mean loss, is
       (1/N) Σ_n ∂ℓ_n ∂ℓ_nᵀ. Shape (groups, *coordinates).
    """

    A: Tensor
    G: Tensor


class Measured(NamedTuple):
    """All that was measured of a layer.

    factors: The Kronecker factors.
    moments: The sum of the squares of each example's gradient, normalised as G is, in the basis
       that they were measured in, (groups, d_out, d_in [+ 1]); None if they were not.
    """

    factors: Factors
    moments: Tensor | None

    def unscaled(self, scale: Tensor) -> Measured:
        """The same of a loss that was multiplied by `scale`, without that."""
        factors = Factors(self.factors.A, self.factors.G / scale**2)
        return Measured(factors, None if self.moments is None else self.moments / scale**2)
