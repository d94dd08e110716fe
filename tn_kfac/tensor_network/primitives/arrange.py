"""A tensor with its axes arranged as a kernel wants them, or summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from math import prod

from torch import Tensor

from tn_kfac.tensor_network.network import Axes, Operand

Sizes = Mapping[str, int]
Materialise = Callable[[Operand], Tensor]


def arranged(tensor: Tensor, axes: Axes, roles: tuple[Axes, ...]) -> Tensor:
    """A tensor of the given axes with one dimension per role."""
    order, shape = _layout(axes, roles, tensor.shape)
    tensor = tensor if order is None else tensor.permute(order)
    return tensor.reshape(shape)


@lru_cache(maxsize=4096)
def _layout(
    axes: Axes, roles: tuple[Axes, ...], sizes: tuple[int, ...]
) -> tuple[list[int] | None, list[int]]:
    """The order of the dimensions, None if they stay, and the shape afterwards."""
    size = dict(zip(axes, sizes, strict=True))
    order = [axes.index(axis) for axis in chain.from_iterable(roles)]
    order = None if order == sorted(order) else order
    return order, [prod(size[axis] for axis in role) for role in roles]


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
