"""Factor updates shared out over ranks: each updates those of some layers, and all get all.

An update of a dense factor of d rows takes some 8 d³ operations, however many ranks see the data,
and every rank would find the same. What is sent in return are the new factor and its momentum, 8 d²
bytes of float32: a byte for d operations. So all ranks go on with the same state, and any of them
can save it. Other structures have fewer operations for a byte, but small calls that take longer
than what they send. Layers whose factors are diagonal are everybody's: on a GPU all of them take
one launch together, less time than a message.

Or nobody else keeps a layer's factors: its owner sends its preconditioned gradient in each step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from tn_kfac.curvature import Recipe
from tn_kfac.optim.binding import Active, Binding
from tn_kfac.optim.groups import Group
from tn_kfac.optim.owned import OwnedOptimizer
from tn_kfac.optim.ranks import from_owners

State = dict[str, Any]
SHARING = (False, "factors", "gradients")
"""What ranks send each other: nothing, new factors, or preconditioned gradients."""
PRODUCTS = {"diagonal": 1, "gram": 4, "rows": 2}
"""Of an update, by what a structure reads of the curvature: KᵀHK (two), KᵀK and K m. Rows are
projected in the backward pass."""


CALLS = 2**30
"""What the small calls of a layer's update count beside these products. They take 0.5 to 3 ms on
one core, for which time is that of 2²⁵ multiply-adds on that core, and of 2³⁴ on a large GPU."""


def price(recipe: Recipe) -> int:
    """By what layers are shared out; 0 if all factors are diagonal."""
    cost = update_cost(recipe)
    return cost + CALLS if cost else 0


def update_cost(recipe: Recipe) -> int:
    """Multiply-adds of the matrix products in an update of a layer's factors; 0 if all diagonal.

    A product of d×d matrices with n coordinates takes some n² / d: d³ if they are dense, d b² in
    blocks of b rows, d k² with k dense rows.
    """
    spaces = (recipe.input_structure, recipe.output_structure)
    if all(space.reads == "diagonal" for space in spaces):
        return 0
    shapes, dims = recipe.shapes()[:2], (recipe.dim_in, recipe.dim_out)
    return sum(
        groups * PRODUCTS[space.reads] * (prod(coordinates) ** 2 // max(dim, 1))
        for space, (groups, *coordinates), dim in zip(spaces, shapes, dims, strict=True)
    )


def check_owned(binding: Binding, sharing: Any) -> None:
    """Check that one rank alone may keep a layer's factors, if it shall.

    Raises:
        ValueError: If the backward passes of all ranks read them.
    """
    recipe = binding.tap.recipe
    for space in (recipe.input_structure, recipe.output_structure):
        if sharing == "gradients" and space.reads == "rows":
            raise ValueError(
                f"share_updates='gradients' keeps the factors of layer {binding.site.name!r} on "
                f"one rank, but with structure={space.name!r} the backward passes of all ranks "
                "project rows by them: choose share_updates='factors', or 'dense' or 'diagonal'"
            )


class SharedUpdates(OwnedOptimizer):
    """An optimizer whose factors may be updated by one rank for all.

    What such a step sends, and when, does not depend on values, and checks that may fail are made
    on all ranks: none waits for one that has raised.
    """

    @abstractmethod
    def _beta(self, state: State, group: Group) -> float:
        """The step size of a layer's factors now.

        Raises:
            ValueError, TypeError: If a schedule gave none.
        """

    @abstractmethod
    def _updated(self, state: State, group: Group) -> list[Tensor]:
        """What of a layer's state an update changes."""

    def _take_in(self, measured: Sequence[Active], scale: Tensor | None) -> None:
        """Update the factors of this rank's layers, and get those of the others."""
        if not self._owners.several:
            super()._take_in(measured, scale)
            return
        mine = []
        for layer in measured:
            self._beta(layer.state, layer.group)  # raises on all ranks, or else some would wait
            if self._owners.works(layer.binding, self._bindings):
                mine.append(layer)
            else:
                self._count_update(layer.state, layer.group)
        super()._take_in(mine, scale)
        if not self._owners.apart:
            self._exchange(measured)

    def _exchange(self, updated: Sequence[Active]) -> None:
        """Have the factors of all layers as their owners have them."""
        parts = [
            (self._owners.of(binding, self._bindings), tensor)
            for binding, group, state, _ in updated
            for tensor in self._updated(state, group)
        ]
        for (_, held), received in zip(parts, from_owners(parts, self._process_group), strict=True):
            if received is not held:
                held.copy_(received)
