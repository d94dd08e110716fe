"""A tensor with its axes arranged as a kernel wants them, or summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from math import prod

from torch import Tensor

from tn_kfac.tensor_network.network import Axes, Operand

Sizes = Mapping[str, int]
Materialise = Callable[[Operand], Tensor]


def arranged(tensor: Tensor, axes: Axes, roles: Sequence[Axes], sizes: Sizes) -> Tensor:
    """A tensor of the given axes with one dimension per role."""
    order = list(chain.from_iterable(roles))
    permuted = tensor.permute([axes.index(axis) for axis in order])
    return permuted.reshape([prod(sizes[a] for a in role) for role in roles])


def sum_over(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """The sum over ascending dimensions, run by run from the last: others would be copied."""
    dims = list(dims)
    while dims:
        run = last_run(dims)
        tensor = tensor.sum(run)
        dims = dims[: -len(run)]
    return tensor


def last_run(dims: Sequence[int]) -> list[int]:
    """The last neighbours among ascending dimensions."""
    return [dim for at, dim in enumerate(dims) if dim == dims[-1] - (len(dims) - 1 - at)]
