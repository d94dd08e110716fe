"""What an optimizer would cost each of many ranks, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tn_kfac.optim import KFAC, SINGD, checks
from tn_kfac.optim.binding import Binding
from tn_kfac.optim.inverses import COLD_ITERATIONS
from tn_kfac.optim.owned import OwnedOptimizer
from tn_kfac.optim.owners import owners
from tn_kfac.optim.pending import BESIDE
from tn_kfac.optim.ranks import COUNTS, counts_apart
from tn_kfac.optim.shared_inverses import costs
from tn_kfac.optim.shared_updates import price, update_cost

FLOPS = {"eigh": 9, "qr": 16, "cholesky": 1, "newton-schulz": 6 * COLD_ITERATIONS}
"""Of a decomposition, for each b³ (Golub and Van Loan, Matrix Computations, Sections 8.3 and 4.2);
of Newton-Schulz from a multiple of I, after which a few iterations do."""
META = torch.device("meta")
Options = dict[str, Any]


@dataclass(frozen=True)
class RankCosts:
    """Bytes and operations of one rank, of the one that has most where they differ.

    Messages are as large as said here; what a network moves for them depends on its algorithm (a
    ring moves 2 (W - 1) / W times an all-reduced message through each rank).

    Attributes:
        world_size: W, the number of ranks.
        statistics_bytes: All-reduced (in `reduce_dtype`) in a step that updates all factors.
        statistics_bytes_per_step: The same on average, by the intervals T.
        factor_bytes: Factors with their momenta or moments, as far as they are on every rank.
        owned_bytes: What owners may keep for themselves: KFAC's inverses or eigenbases (twice if
            there is a `lag`); with share_updates="gradients" SINGD's factors and momenta.
        broadcast_bytes: In a step in which all owners send what they computed: inverses,
            SINGD's factors and momenta, or preconditioned gradients.
        broadcast_bytes_per_step: The same on average: inverses by the intervals T_inverse,
            SINGD's factors by T, preconditioned gradients in every step.
        owned_flops: Of the work that can be shared out, if all of it is due: KFAC's new inverses,
            roughly, by `FLOPS`; the matrix products of an update of SINGD's factors that are not
            diagonal.
        owned_share: The part of that work that this rank does.
    """

    world_size: int
    statistics_bytes: int
    statistics_bytes_per_step: float
    factor_bytes: int
    owned_bytes: int
    broadcast_bytes: int
    broadcast_bytes_per_step: float
    owned_flops: int
    owned_share: float


class _Work(NamedTuple):
    """A piece of work that has one owner, if ranks share.

    Attributes:
        price: By which it is shared out.
        flops: What it takes.
        kept: Bytes of what is found, where that is kept.
        sent: Bytes of what the owner sends.
        interval: How often, in steps.
    """

    price: int
    flops: int
    kept: int
    sent: int
    interval: int


class _Held(NamedTuple):
    """Bytes of a layer's factors, and the work that ranks can share."""

    factors: int
    works: list[_Work]


def rank_costs(optimizer: OwnedOptimizer, world_size: int) -> RankCosts:
    """What an optimizer would cost each of `world_size` data-parallel ranks.

    Nothing is computed, so a model on the meta device serves as well; parameters, their gradients
    and momentum are the user's to add. Schedules of T and T_inverse count as they are at step 0.

    >>> with torch.device("meta"):
    ...     model = resnet50()
    >>> rank_costs(KFAC(model), world_size=64)

    Args:
        optimizer: A `SINGD` or `KFAC`, on however many ranks it runs now.
        world_size: The number of ranks.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If world_size is not positive.
    """
    if not isinstance(optimizer, OwnedOptimizer):
        raise TypeError(f"optimizer must be a SINGD or a KFAC, got {type(optimizer).__name__}")
    checks.interval("world_size", world_size)
    where = optimizer._where()
    layers = [(b, optimizer.param_groups[where[id(b.parameters[0])]]) for b in optimizer._bindings]
    dtype = optimizer._sums.dtype
    sums = [(_statistics(binding, dtype), _interval(group["T"])) for binding, group in layers]
    held = [_held(optimizer, *layer) for layer in layers]
    works = [work for layer in held for work in layer.works]
    together = world_size > 1
    kept, flops, sent = _shared(works, optimizer.sharing if together else False, world_size)
    total = sum(work.flops for work in works)
    return RankCosts(
        world_size,
        together * sum(size for size, _ in sums),
        together * sum(size / interval for size, interval in sums),
        sum(layer.factors for layer in held),
        kept,
        sum(work.sent for work in sent),
        sum(work.sent / work.interval for work in sent),
        flops,
        flops / total if total else 0.0,
    )


def _shared(works: Sequence[_Work], sharing: Any, ranks: int) -> tuple[int, int, Sequence[_Work]]:
    """The most that a rank keeps (bytes) and does (FLOPs), and the work whose results are sent."""
    loads = [0] * ranks
    places = owners([w.price for w in works], loads) if sharing else [None for _ in works]
    kept, flops = [0] * ranks, [0] * ranks
    for work, owner in zip(works, places, strict=True):
        everybody = range(ranks)
        for rank in everybody if owner is None else (owner,):
            flops[rank] += work.flops
        for rank in everybody if owner is None or sharing != "gradients" else (owner,):
            kept[rank] += work.kept
    sent = [work for work, owner in zip(works, places, strict=True) if owner is not None]
    return max(kept), max(flops), sent


@singledispatch
def _held(optimizer: Any, binding: Binding, group: Options) -> _Held:
    """What a layer takes."""
    raise AssertionError(type(optimizer))


@_held.register
def _(optimizer: SINGD, binding: Binding, group: Options) -> _Held:
    recipe, state = binding.tap.recipe, optimizer._fresh(binding, {}, group, META)
    size, sent = _bytes(state.values()), _bytes(optimizer._updated(state, group))
    cost, flops = price(recipe), 2 * update_cost(recipe)
    if optimizer.sharing == "gradients":
        return _Held(0, [_Work(cost, flops, size, _direction(binding), 1)])
    return _Held(size, [_Work(cost, flops, 0, sent, _interval(group["T"]))])


@_held.register
def _(optimizer: KFAC, binding: Binding, group: Options) -> _Held:
    state = optimizer._new_state(binding, group, META)
    inverse = optimizer._fresh(binding, state, group, META)
    sides = [[v for key, v in inverse.items() if key.startswith(side)] for side in "AG"]
    copies = 2 if group["lag"] else 1
    found = [
        _Work(
            cubes,
            cubes * FLOPS[group["inverse"]],
            copies * _bytes(side),
            _bytes(v.to(torch.promote_types(v.dtype, torch.float32)) for v in side),
            _interval(group["T_inverse"]),
        )
        for side, cubes in zip(sides, costs(binding.tap.recipe), strict=True)
    ]
    factors = _bytes(v for k, v in state.items() if k.removeprefix(BESIDE) not in inverse)
    if optimizer.sharing == "gradients":
        cubes, flops, kept, *_ = map(sum, zip(*found, strict=True))
        found = [_Work(cubes, flops, kept, _direction(binding), 1)]
    return _Held(factors, found)


def _direction(binding: Binding) -> int:
    """Bytes of a layer's preconditioned gradient matrix."""
    recipe = binding.tap.recipe
    dtype = torch.promote_types(binding.parameters[0].dtype, binding.dtypes[1])
    return recipe.layer.groups * recipe.dim_out * recipe.dim_in * dtype.itemsize


def _statistics(binding: Binding, dtype: torch.dtype | None) -> int:
    """Bytes of what is sent of what is measured of a layer."""
    tap = binding.tap
    numbers = list(map(prod, tap.recipe.shapes()))
    counts = numbers[COUNTS] if counts_apart(tap, dtype) else 0
    sent = (dtype or tap.dtype).itemsize
    return (sum(numbers) - counts) * sent + counts * tap.dtype.itemsize


def _interval(T: int | Callable[[int], int]) -> int:
    return T if isinstance(T, int) else T(0)


def _bytes(values: Iterable[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
