"""Who does which part of the work: pieces of it shared out over ranks by what they cost.

Ranks take turns, the most expensive piece first, each time the rank that has least to do: at most
4/3 of the best sharing there is (https://doi.org/10.1137/0117039). All ranks find the same owners
from shapes alone, and send the same messages whatever their values are, so that nothing that one
rank meets (a factor that is not finite, say) leaves another one waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tn_kfac.curvature import Recipe
from tn_kfac.optim.binding import Binding
from tn_kfac.optim.ranks import rank_in, ranks_of


def owners(costs: Sequence[int], loads: list[int]) -> list[int | None]:
    """The rank of each piece of work; None: it costs nothing, and every rank does it.

    `loads` is what each rank has to do already, and is brought up to date.
    """
    found: list[int | None] = [None] * len(costs)
    for at in sorted(range(len(costs)), key=lambda at: -costs[at]):
        if costs[at]:
            owner = found[at] = loads.index(min(loads))
            loads[owner] += costs[at]
    return found


class Owners:
    """Which rank works for which layer, and what it sends to the others.

    Once a layer has an owner it keeps it, also if layers join later.

    Attributes:
        sharing: False, what all ranks get ("inverses", "factors"), or "gradients", if an owner
            keeps that for itself and sends preconditioned gradients.
        price: What the work for a layer costs, by its shapes.
    """

    def __init__(self, sharing: Any, group: Any, price: Callable[[Recipe], int]) -> None:
        self.sharing, self.price, self._group = sharing, price, group
        self._loads: list[int] = []
        self._found: dict[str, int | None] = {}

    @property
    def several(self) -> bool:
        """Whether there are ranks to share with."""
        return bool(self.sharing) and ranks_of(self._group) > 1

    @property
    def apart(self) -> bool:
        """Whether owners keep for themselves what they find."""
        return self.sharing == "gradients" and self.several

    def of(self, binding: Binding, bindings: Iterable[Binding]) -> int | None:
        """The owner of a layer, which is one of `bindings`; None: all ranks."""
        if binding.site.name not in self._found:
            self._loads = self._loads or [0] * ranks_of(self._group)
            new = [b for b in bindings if b.site.name not in self._found]
            prices = [self.price(b.tap.recipe) for b in new]
            names = (b.site.name for b in new)
            self._found |= zip(names, owners(prices, self._loads), strict=True)
        return self._found[binding.site.name]

    def works(self, binding: Binding, bindings: Iterable[Binding]) -> bool:
        """Whether this rank does the work for a layer: alone, or as every rank does."""
        return not self.several or self.of(binding, bindings) in (None, rank_in(self._group))
