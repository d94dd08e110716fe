"""Randomised VJPs (tensor dropout): a contracted axis is sampled and rescaled.

Of an axis of size M, m indices are kept, without replacement, and weighted by M/m. The
expectation over the sample is the exact VJP (https://arxiv.org/abs/2307.02275, Section 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tn_kfac.expressions.convolution import conv_input_vjp, conv_weight_vjp
from tn_kfac.expressions.operation import Operation
from tn_kfac.tensor_network.execute import einsum_expression, execute
from tn_kfac.tensor_network.network import Network
from tn_kfac.tensor_network.slicing import plan

Sampled = tuple[Network, dict[str, Tensor]]


class RandomizedOperation:
    """An operation with sampled axes.

    Arguments are those of the exact operation, and by keyword:

    keep_channels: Fraction of the channels (per group) to keep, in (0, 1].
    keep_positions: Fraction of the output positions to keep, along each spatial axis.
    generator: Source of randomness.
    """

    def __init__(self, exact: Operation[...], channels: tuple[str, str]) -> None:
        self.exact = exact
        self._channels = channels
        self.__doc__ = f"Unbiased estimate by sampling: {exact.__doc__}"

    def __call__(
        self,
        *args: Any,
        keep_channels: float = 1.0,
        keep_positions: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """An estimate, with a fresh sample.

        Raises:
            ValueError: If a fraction is not in (0, 1], or as the exact operation does.
            TypeError: If an argument has the wrong type.
        """
        network, tensors = self._sampled(args, kwargs, keep_channels, keep_positions, generator)
        simplify = self.exact.expression(*args, **kwargs).simplify
        return execute(plan(network, simplify), tensors)

    def einsum_expression(
        self,
        *args: Any,
        keep_channels: float = 1.0,
        keep_positions: float = 1.0,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[Tensor], tuple[int, ...]]:
        """(equation, operands, shape) of an estimate, with a fresh sample."""
        network, tensors = self._sampled(args, kwargs, keep_channels, keep_positions, generator)
        simplify = self.exact.expression(*args, **kwargs).simplify
        return einsum_expression(network, tensors, simplify)

    def _sampled(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        keep_channels: float,
        keep_positions: float,
        generator: torch.Generator | None,
    ) -> Sampled:
        expression, tensors = self.exact.bound(args, kwargs)
        sampled = (expression.network, tensors)
        positions = [leg.axes[0] for leg in expression.network.operand("v").legs[2:]]
        sampled = _sample(sampled, *self._channels, keep_channels, "channels", generator)
        for axis in positions:
            sampled = _sample(sampled, "v", axis, keep_positions, "positions", generator)
        return sampled


@lru_cache(maxsize=1024)
def _sampled_network(network: Network, name: str, axis: str, kept: int) -> Network:
    return network.sampled(name, axis, kept, f"sample {axis}")


def _sample(
    sampled: Sampled,
    name: str,
    axis: str,
    keep: float,
    what: str,
    generator: torch.Generator | None,
) -> Sampled:
    """Sample one axis of one operand."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"keep_{what} must be a number in (0, 1], got {keep!r}")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep_{what} must be in (0, 1], got {keep!r}")
    if keep == 1.0:
        return sampled
    network, tensors = sampled
    size = network.size[axis]
    kept = ceil(keep * size)
    tensor = tensors[name]
    index = torch.randperm(size, generator=generator)[:kept].to(tensor.device)
    selector = torch.zeros(kept, size, dtype=tensor.dtype, device=tensor.device)
    selector[torch.arange(kept, device=tensor.device), index] = size / kept
    legs = network.operand(name).legs
    dim = next(d for d, leg in enumerate(legs) if axis in leg.axes)
    split = tensor.unflatten(dim, [network.size[a] for a in legs[dim].axes])
    inner = dim + legs[dim].axes.index(axis)
    selected = split.index_select(inner, index).flatten(dim, dim + len(legs[dim].axes) - 1)
    network = _sampled_network(network, name, axis, kept)
    return network, {**tensors, name: selected, f"sample {axis}": selector}


randomized_weight_vjp = RandomizedOperation(conv_weight_vjp, channels=("x", "c"))
randomized_input_vjp = RandomizedOperation(conv_input_vjp, channels=("v", "d"))
