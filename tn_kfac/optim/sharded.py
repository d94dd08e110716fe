"""Parameters in shards: what `torch.distributed.fsdp.fully_shard` makes of those of a model.

Between steps such a parameter is a DTensor, of which each rank holds its own shard; so are its
gradient, already averaged over ranks, and its momentum. In forward and backward passes it is whole
and plain, so that curvature is measured as ever. Factors are whole on every rank.

A direction is always that of a rank's own shard. Where factors are diagonal they scale each entry
of a gradient for itself, and nothing is gathered; else a layer's gradient is, for as long as it is
preconditioned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed, nn

from tn_kfac.optim.rules import Rule

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; they are not imported for a model that has none."""
    if type(tensor) in PLAIN or not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; gathered, if it is sharded, so that all ranks must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This rank's shard, which shares the tensor's memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def own_part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor of a parameter's shape, a copy of what this rank's shard covers.

    A copy, so that nobody keeps the whole one; plain parameters get the tensor itself.
    """
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local().clone()


def total(numbers: Mapping[Tensor, Tensor]) -> Tensor:
    """The sum of one number for each parameter; those of shards are summed over all shards."""
    together: dict[Any, list[Tensor]] = defaultdict(list)
    for p, number in numbers.items():
        together[(p.device_mesh, p.placements) if is_sharded(p) else None].append(number)
    return torch.stack([_over_ranks(torch.stack(n).sum(), at) for at, n in together.items()]).sum()


def _over_ranks(number: Tensor, at: Any) -> Tensor:
    """The sum of a number over the ranks that hold different shards; at: mesh and placements."""
    if at is None:
        return number
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = at
    parts = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(number, mesh, parts, run_check=False).full_tensor()


def write(
    rule: Rule, along: Mapping[Tensor, Tensor], states: Mapping[Tensor, Any], group: dict[str, Any]
) -> None:
    """Step parameters by a rule along directions of this rank's shards.

    Its buffers become DTensors in the states of sharded parameters.
    """
    if not any(map(is_sharded, along)):
        rule(list(along), list(along.values()), [states[p] for p in along], group)
        return
    parts = {p: {key: _own_entry(value) for key, value in states[p].items()} for p in along}
    rule([own(p) for p in along], list(along.values()), list(parts.values()), group)
    for p, part in parts.items():
        for key in part.keys() - states[p].keys():
            states[p][key] = _sharded_like(p, part[key])


def _own_entry(value: Any) -> Any:
    return own(value) if isinstance(value, Tensor) else value


def _sharded_like(parameter: Tensor, value: Any) -> Any:
    """A new buffer of a parameter's shard as a DTensor; a number of steps as it is."""
    if not is_sharded(parameter) or value.shape != own(parameter).shape:
        return value
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        value, mesh, placements, run_check=False, shape=shape, stride=stride
    )  # fmt: skip


def check_sharding(name: str, parameters: Iterable[Tensor]) -> None:
    """Check that ranks differ in their samples alone.

    Raises:
        ValueError: If parameters are sharded along two dimensions of a mesh: tensor parallel.
    """
    for p in parameters:
        if is_sharded(p) and sum(not place.is_replicate() for place in p.placements) > 1:
            raise ValueError(
                f"layer {name!r} has a parameter with placements {p.placements}: curvature is that "
                "of whole layers. Use data parallel meshes alone: fully_shard, or hybrid sharding"
            )


def check_same(name: str, modules: Iterable[nn.Module], owned: Mapping[str, Tensor | None]) -> None:
    """Check that modules still have the plain parameters that an optimizer knows as theirs.

    Raises:
        RuntimeError: If not: they were sharded later.
    """
    for module in modules:
        for key, p in owned.items():
            if p is not None and not is_sharded(p) and getattr(module, key) is not p:
                raise RuntimeError(
                    f"layer {name!r} has other parameters than when the optimizer was built, as "
                    "fully_shard replaces them: call fully_shard(model) first, then build the "
                    "optimizer"
                )
