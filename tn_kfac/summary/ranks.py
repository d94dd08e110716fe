"""What an optimizer would cost each of many ranks, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tn_kfac.optim import checks
from tn_kfac.optim.base import KroneckerOptimizer
from tn_kfac.optim.binding import Binding
from tn_kfac.optim.inverses import COLD_ITERATIONS
from tn_kfac.optim.owners import costs, owners

FLOPS = {"eigh": 9, "qr": 7, "cholesky": 1, "newton-schulz": 4 * COLD_ITERATIONS}
"""Of a decomposition, for each b³ (Golub and Van Loan, Matrix Computations, Sections 8.3 and 4.2);
of Newton-Schulz from a multiple of I, after which a few iterations do."""
META = torch.device("meta")


@dataclass(frozen=True)
class RankCosts:
    """Bytes and operations of one rank, of the one that has most where they differ.

    Messages are as large as said here; what a network moves for them depends on its algorithm (a
    ring moves 2 (W - 1) / W times an all-reduced message through each rank).

    Attributes:
        world_size: W, the number of ranks.
        statistics_bytes: All-reduced in a step that updates all factors.
        statistics_bytes_per_step: The same on average, by the intervals T.
        factor_bytes: Factors with their momenta or moments, on every rank.
        inverse_bytes: Inverses or eigenbases.
        broadcast_bytes: In a step in which all owners send what they computed: inverses, or with
            share_inverses="gradients" preconditioned gradients.
        broadcast_bytes_per_step: The same on average: inverses by the intervals T_inverse,
            preconditioned gradients in every step.
        decomposition_flops: When all inverses are computed anew; roughly, by `FLOPS`.
        decomposition_share: The part of all decompositions that this rank computes.
    """

    world_size: int
    statistics_bytes: int
    statistics_bytes_per_step: float
    factor_bytes: int
    inverse_bytes: int
    broadcast_bytes: int
    broadcast_bytes_per_step: float
    decomposition_flops: int
    decomposition_share: float


@dataclass(frozen=True)
class _Layer:
    """What one layer takes; of its inverse for A and G apart."""

    statistics: int
    T: int
    factors: int
    inverses: tuple[int, int]
    sent: tuple[int, int]
    direction: int
    T_inverse: int
    cubes: tuple[int, int]
    flops: int


def rank_costs(optimizer: KroneckerOptimizer, world_size: int) -> RankCosts:
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
    if not isinstance(optimizer, KroneckerOptimizer):
        raise TypeError(f"optimizer must be a SINGD or a KFAC, got {type(optimizer).__name__}")
    checks.interval("world_size", world_size)
    where = optimizer._where()
    groups = [optimizer.param_groups[where[b.parameters[0]]] for b in optimizer._bindings]
    layers = [_layer(optimizer, *pair) for pair in zip(optimizer._bindings, groups, strict=True)]
    together = world_size > 1
    inverse_bytes, share, sent = _shared(layers, optimizer.sharing, world_size)
    cubes = [sum(layer.cubes) * layer.flops for layer in layers]
    return RankCosts(
        world_size,
        together * sum(layer.statistics for layer in layers),
        together * sum(layer.statistics / layer.T for layer in layers),
        sum(layer.factors for layer in layers),
        inverse_bytes,
        sum(size for size, _ in sent),
        sum(size / interval for size, interval in sent),
        round(share * sum(cubes)),
        share,
    )


def _shared(
    layers: Sequence[_Layer], sharing: Any, ranks: int
) -> tuple[int, float, list[tuple[int, int]]]:
    """Bytes of inverses, part of the work, and (bytes sent, interval) of each message part."""
    total = sum(sum(layer.cubes) for layer in layers)
    everything = sum(sum(layer.inverses) for layer in layers)
    loads = [0] * ranks
    if ranks == 1 or not sharing:
        return everything, 1.0 if total else 0.0, []
    if sharing == "inverses":
        cubes = [cube for layer in layers for cube in layer.cubes]
        places = owners(cubes, loads)
        sizes = ((size, layer.T_inverse) for layer in layers for size in layer.sent)
        sent = [part for part, at in zip(sizes, places, strict=True) if at is not None]
        return everything, max(loads) / max(total, 1), sent
    places = owners([sum(layer.cubes) for layer in layers], loads)
    kept = [0] * ranks
    for layer, owner in zip(layers, places, strict=True):
        for rank in range(ranks) if owner is None else (owner,):
            kept[rank] += sum(layer.inverses)
    sent = [(lay.direction, 1) for lay, at in zip(layers, places, strict=True) if at is not None]
    return max(kept), max(loads) / max(total, 1), sent


def _layer(optimizer: KroneckerOptimizer, binding: Binding, group: dict[str, Any]) -> _Layer:
    recipe = binding.tap.recipe
    state = optimizer._new_state(binding, group, META)
    inverse = optimizer._fresh(binding, state, group, META)
    kept = {key: value for key, value in state.items() if key not in inverse}
    sides = [[v for k, v in inverse.items() if k.startswith(side)] for side in "AG"]
    exact = [[v.to(torch.promote_types(v.dtype, torch.float32)) for v in side] for side in sides]
    matrix = (recipe.layer.groups, recipe.dim_out, recipe.dim_in)
    promoted = torch.promote_types(binding.parameters[0].dtype, binding.dtypes[1])
    return _Layer(
        statistics=sum(map(prod, recipe.probe_shapes())) * binding.tap.dtype.itemsize,
        T=_interval(group["T"]),
        factors=_bytes(kept.values()),
        inverses=(_bytes(sides[0]), _bytes(sides[1])),
        sent=(_bytes(exact[0]), _bytes(exact[1])),
        direction=prod(matrix) * promoted.itemsize,
        T_inverse=_interval(group.get("T_inverse", 1)),
        cubes=costs(recipe) if inverse else (0, 0),
        flops=FLOPS[group.get("inverse", "eigh")],
    )


def _interval(T: int | Callable[[int], int]) -> int:
    return T if isinstance(T, int) else T(0)


def _bytes(values: Iterable[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
