"""The implementations that are compared: ours, unfold, einconv and torch's own.

A `Case` holds the tensors of one layer. A baseline is a function of it to the result;
einconv's and ours are called with the arguments that `arguments` derives from it, for
both have the same signatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from benchmarks.convolutions import Layer


@dataclass(frozen=True)
class Case:
    """A layer's input (n, c, h, w), weight (d, c/g, k, k) and output gradient (n, d, h', w')."""

    layer: Layer
    x: Tensor
    weight: Tensor
    v: Tensor

    @property
    def convolution(self) -> dict[str, Any]:
        """The hyper-parameters that `torch.nn.functional.conv2d` takes."""
        return {**self.layer.steps, "groups": self.layer.groups}


def make_case(
    layer: Layer, device: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> Case:
    """Random tensors, the same in every run. Activations do not average to zero: x has mean ½."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, device=device, generator=generator).to(dtype)
        return values.contiguous(memory_format=memory_format)

    n, c = layer.shape[:2]
    x = normal(*layer.shape).add_(0.5)
    weight = normal(layer.out_channels, c // layer.groups, *layer.kernel_size)
    return Case(layer, x, weight, normal(n, layer.out_channels, *layer.output_size))


# As people write them with unfold. Names say the axes: n examples, g groups, o positions,
# k entries of a window (channels of the group × pixels).


def columns(case: Case) -> Tensor:
    """Unfolded input; shape (n, g, k, o)."""
    return F.unfold(case.x, **case.layer.window).unflatten(1, (case.layer.groups, -1))


def _grouped_v(case: Case) -> Tensor:
    """Output gradient; shape (n, g, d, o)."""
    return case.v.flatten(2).unflatten(1, (case.layer.groups, -1))


def _grouped_weight(case: Case) -> Tensor:
    """Weight; shape (g, d, k)."""
    return case.weight.flatten(1).unflatten(0, (case.layer.groups, -1))


def unfold_kfac_reduce(case: Case) -> Tensor:
    """Σ_n ā āᵀ / n with ā the mean over positions."""
    rows = columns(case).mean(-1)
    return torch.einsum("ngi,ngj->gij", rows, rows) / len(rows)


def unfold_kfac_expand(case: Case) -> Tensor:
    """Σ_{n,o} a aᵀ / n as one matrix product, a row for each example and position."""
    rows = columns(case).permute(1, 0, 3, 2).flatten(1, 2)
    return rows.mT @ rows / len(case.x)


def unfold_kfac_reduce_diagonal(case: Case) -> Tensor:
    """Σ_n ā² / n."""
    return columns(case).mean(-1).square().mean(0)


def unfold_kfac_expand_diagonal(case: Case) -> Tensor:
    """Σ_{n,o} a² / n."""
    return columns(case).square().sum(-1).mean(0)


def unfold_conv_forward(case: Case) -> Tensor:
    """Weight matrix times columns."""
    product = _grouped_weight(case) @ columns(case)
    return product.flatten(1, 2).unflatten(-1, case.layer.output_size)


def unfold_conv_input_vjp(case: Case) -> Tensor:
    """Transposed weight matrix times output gradient, folded."""
    product = (_grouped_weight(case).mT @ _grouped_v(case)).flatten(1, 2)
    return F.fold(product, case.layer.shape[2:], **case.layer.window)


def unfold_conv_weight_vjp(case: Case) -> Tensor:
    """Output gradient times columns, over examples and positions."""
    product = torch.einsum("ngdo,ngko->gdk", _grouped_v(case), columns(case))
    return product.reshape(case.weight.shape)


def unfold_conv_weight_vjp_per_example(case: Case) -> Tensor:
    """Output gradient times columns, over positions."""
    product = _grouped_v(case) @ columns(case).mT
    return product.reshape(len(case.x), *case.weight.shape)


def unfold_unfold_input(case: Case) -> Tensor:
    """`torch.nn.functional.unfold` itself."""
    return F.unfold(case.x, **case.layer.window)


# Torch's own operations.


def torch_conv_forward(case: Case) -> Tensor:
    """`torch.nn.functional.conv2d`."""
    return F.conv2d(case.x, case.weight, **case.convolution)


def torch_conv_input_vjp(case: Case) -> Tensor:
    """`torch.nn.grad.conv2d_input`."""
    return conv2d_input(case.x.shape, case.weight, case.v, **case.convolution)


def torch_conv_weight_vjp(case: Case) -> Tensor:
    """`torch.nn.grad.conv2d_weight`."""
    return conv2d_weight(case.x, case.weight.shape, case.v, **case.convolution)


def torch_conv_weight_vjp_per_example(case: Case) -> Tensor:
    """The weight gradient of torch under `torch.vmap`."""

    def of_example(x: Tensor, v: Tensor) -> Tensor:
        return conv2d_weight(x[None], case.weight.shape, v[None], **case.convolution)

    return torch.vmap(of_example)(case.x, case.v)


def arguments(operation: str, case: Case) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of our (and einconv's) operation of that name."""
    kernel = {"kernel_size": case.layer.kernel_size}
    if operation == "conv_forward":
        return (case.x, case.weight), case.convolution
    if operation == "conv_input_vjp":
        return (case.weight, case.v, case.layer.shape[2:]), case.convolution
    if operation.startswith("conv_weight_vjp"):
        return (case.x, case.v), {**kernel, **case.convolution}
    return (case.x,), {**kernel, **case.convolution}


def call(function: Callable[..., Any], operation: str, case: Case) -> Any:
    """Call a function that has the signature of our operation of that name."""
    positional, named = arguments(operation, case)
    return function(*positional, **named)
