"""The value of a network by its definition: each node as a dense tensor, then one einsum.

    T[output] = scale · Σ_{other axes} Π_nodes node[axes]

Index patterns are filled by loops over Π[k, o, i] = 1 iff i = o·stride + k·dilation − padding.
Of the library this knows the nodes' fields and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from itertools import product

import torch
from torch import Tensor

from tn_kfac.tensor_network.network import Delta, Network, Node, Operand, Window
from tn_kfac.tensor_network.pattern import Pattern, SpatialAxis


def pattern_entries(axis: SpatialAxis) -> Tensor:
    """Π[k, o, i], entry by entry."""
    kernels, outputs, inputs = axis.kernel_size, axis.output_size, axis.input_size
    entries = torch.zeros(kernels, outputs, inputs, dtype=torch.float64)
    for k, o, i in product(range(kernels), range(outputs), range(inputs)):
        entries[k, o, i] = i == o * axis.stride + k * axis.dilation - axis.padding[0]
    return entries


@singledispatch
def dense(node: Node, tensors: Mapping[str, Tensor], size: Mapping[str, int]) -> Tensor:
    """The dense tensor of a node."""
    raise TypeError(f"the oracle does not know {node!r}")


@dense.register
def _(node: Pattern, tensors: Mapping[str, Tensor], size: Mapping[str, int]) -> Tensor:
    summed = [dim for dim, leg in enumerate(node.legs) if leg is None]
    entries = pattern_entries(node.axis)
    return entries.sum(summed) if summed else entries


@dense.register
def _(node: Delta, tensors: Mapping[str, Tensor], size: Mapping[str, int]) -> Tensor:
    return torch.eye(size[node.left], size[node.right], dtype=torch.float64)


@dense.register
def _(node: Operand, tensors: Mapping[str, Tensor], size: Mapping[str, int]) -> Tensor:
    tensor, dim = tensors[node.name], 0
    for window in (window for leg in node.legs for window in leg.windows):
        if window is not None:
            tensor = _windowed(tensor, dim, window)
        dim += 1 if window is None else 2
    assert dim == tensor.dim(), f"{node} does not fit a tensor of {tensor.dim() - dim} more axes"
    return tensor.reshape([size[axis] for axis in node.axes])


def _windowed(tensor: Tensor, dim: int, window: Window) -> Tensor:
    """Dimension `dim`, between zeros, as (output, kernel)."""
    shape = list(tensor.shape)
    zeros = [tensor.new_zeros(*shape[:dim], pad, *shape[dim + 1 :]) for pad in window.padding]
    tensor = torch.cat([zeros[0], tensor, zeros[1]], dim)
    index = [
        [o * window.stride + k * window.dilation for k in range(window.kernels)]
        for o in range(window.outputs)
    ]
    picked = tensor.index_select(dim, torch.tensor(index).flatten())
    return picked.unflatten(dim, (window.outputs, window.kernels))


def evaluate(network: Network, tensors: Mapping[str, Tensor]) -> Tensor:
    """The network's tensor; an output axis that no node has is constant."""
    label = {axis: number for number, (axis, _) in enumerate(network.sizes)}
    factors: list[tuple[Tensor, tuple[str, ...]]] = [
        (dense(node, tensors, network.size), node.axes) for node in network.nodes
    ]
    held = {axis for _, axes in factors for axis in axes}
    for axis in network.output_axes:
        if axis not in held:
            factors.append((torch.ones(network.size[axis], dtype=torch.float64), (axis,)))
    arguments: list[object] = []
    for tensor, axes in factors:
        assert list(tensor.shape) == [network.size[axis] for axis in axes], (axes, tensor.shape)
        arguments += [tensor, [label[axis] for axis in axes]]
    arguments.append([label[axis] for axis in network.output_axes])
    value = torch.einsum(*arguments) if factors else torch.ones((), dtype=torch.float64)
    return float(network.scale) * value.reshape(network.shape)
