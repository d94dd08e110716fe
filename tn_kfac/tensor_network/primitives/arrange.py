"""An operand's tensor, with its axes arranged as a kernel wants them."""

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
