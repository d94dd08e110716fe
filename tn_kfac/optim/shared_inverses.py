"""Inverses shared out over ranks: each computes some of them, and all get all.

A decomposition of a block of b rows takes some b³ operations, however many ranks see the data. So
each is computed by one rank alone, see `owners`, and sent to all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tn_kfac.curvature import Recipe
from tn_kfac.optim.alike import merged
from tn_kfac.optim.damping import Damping
from tn_kfac.optim.inverses import Request
from tn_kfac.optim.notice import Notice
from tn_kfac.optim.owners import owners
from tn_kfac.optim.ranks import from_owners, rank_in, ranks_of
from tn_kfac.optim.refresh import (
    SIDES,
    Found,
    How,
    Layer,
    Task,
    adopt,
    decompose,
    finite,
    hand_out,
    keys_of,
    tasks,
)
from tn_kfac.structures import Structure


def cost(space: Structure, shape: tuple[int, ...]) -> int:
    """Σ b³ over the blocks of matrices with coordinates of this shape; none for diagonals."""
    sizes = (block.shape for block in space.blocks(torch.empty(shape, device="meta")))
    return sum(prod(size[:-2]) * size[-1] ** 3 for size in sizes if size[-1] > 1)


def costs(recipe: Recipe) -> tuple[int, int]:
    """Those of a layer's A and G."""
    spaces = (recipe.input_structure, recipe.output_structure)
    first, second = (cost(s, shape) for s, shape in zip(spaces, recipe.shapes()[:2], strict=True))
    return first, second


def refresh(due: Sequence[tuple[Layer, Damping, How]], notice: Notice, group: Any) -> None:
    """Decompose the factors of all layers, shared out over a group, and use what was found."""
    several = ranks_of(group) > 1
    found = tasks(due if several else merged(due))
    shared = _shared(found, group) if several else [decompose(t.requests, t.how) for t in found]
    for task, parts in zip(found, shared, strict=True):
        hand_out(task, parts, notice, adopt)


def _shared(found: Sequence[Task], group: Any) -> list[Found]:
    """What each rank finds of its share, on all ranks."""
    requests = [request for task in found for request in task.requests]
    prices = [cost(r.space, tuple(r.matrices[0].shape)) for r in requests]
    at = iter(owners(prices, [0] * ranks_of(group)))
    messages: list[tuple[int | None, Tensor]] = []
    counts = []
    for task in found:
        places = [next(at) for _ in task.requests]
        parts = _parts(task, places, rank_in(group))
        counts.append([len(part) for part in parts])
        for owner, part in zip(places, parts, strict=True):
            messages += [(owner, tensor) for tensor in part]
    held = iter(from_owners(messages, group))
    together = [[tuple(next(held) for _ in range(n)) for n in count] for count in counts]
    return [[(part, finite(part)) for part in parts] for parts in together]


def _parts(task: Task, places: Sequence[int | None], rank: int) -> list[tuple[Tensor, ...]]:
    """What this rank finds, and memory for what the others do."""
    mine = [r for r, owner in zip(task.requests, places, strict=True) if owner in (None, rank)]
    done = iter(decompose(mine, task.how))
    sides = ((layer, side) for layer in task.layers for side in SIDES)
    return [
        next(done)[0] if owner in (None, rank) else _room(request, layer, side)
        for request, owner, (layer, side) in zip(task.requests, places, sides, strict=True)
    ]


def _room(request: Request, layer: Layer, side: str) -> tuple[Tensor, ...]:
    """Memory for the tensors that come of a request."""
    like = request.matrices[0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    shapes = (layer.state[key].shape for key in keys_of(layer.state, side))
    return tuple(torch.empty(shape, dtype=dtype, device=like.device) for shape in shapes)
