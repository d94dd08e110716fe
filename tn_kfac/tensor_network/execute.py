"""Evaluation: (plan, tensors) -> tensor. Here the symbolic core meets torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, singledispatch
from math import prod

import torch
from torch import Tensor

from tn_kfac.kernels.products import HALF
from tn_kfac.tensor_network.contract import contract, is_square
from tn_kfac.tensor_network.lower import Primitive
from tn_kfac.tensor_network.network import Delta, Network, Node, Ones, Operand, Window
from tn_kfac.tensor_network.pattern import Pattern
from tn_kfac.tensor_network.plan import Plan, einsum_equation
from tn_kfac.tensor_network.primitives import PRIMITIVES
from tn_kfac.tensor_network.simplify import simplify
from tn_kfac.tensor_network.slicing import AnyPlan, Sliced


def execute(
    plan: AnyPlan, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Contract a plan's network; `tensors` maps operand names to tensors.

    All tensors share dtype and device. The result has their device, and `dtype` (theirs, if it
    is None), in which all sums are formed.
    """
    run = _in_slices if isinstance(plan, Sliced) else _in_steps
    return run(plan, tensors, dtype or next(iter(tensors.values())).dtype)  # type: ignore[arg-type]


def _in_steps(plan: Plan, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    like = next(iter(tensors.values()))
    like = like if like.dtype == dtype else like.new_empty(0, dtype=dtype)
    values: list[Tensor | None] = [
        materialise(leaf.node, leaf.shape, tensors, like) for leaf in plan.leaves
    ]
    scale = plan.scale
    for step in plan.steps:
        terms: list[Tensor] = [values[i] for i in step.inputs]  # type: ignore[misc]
        factor = 1.0
        if step is plan.steps[-1] and scale > 0 and is_square(terms):
            factor, scale = scale, 1.0
            if dtype in HALF:  # the sum could overflow, or the scale underflow
                terms, factor = [terms[0] * factor**0.5] * 2, 1.0
        values.append(contract(step.equation, terms, dtype, factor))
        for number in step.frees:
            values[number] = None
    result = values[-1]
    assert result is not None
    result = result.reshape(plan.shape).to(dtype)
    if scale == 1.0:
        return result
    ours = plan.owns_result and not result.requires_grad
    return result.mul_(scale) if ours else result * scale


def _in_slices(plan: Sliced, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The parts of a sliced plan, added or concatenated."""
    parts: list[Tensor] = []
    for start in range(0, plan.size, plan.chunk):
        count = min(plan.chunk, plan.size - start)
        cut = {
            name: tensors[name].narrow(at.dim, start * at.inner, count * at.inner)
            for name, at in plan.operands
        }
        inner = plan.part if count == plan.chunk or plan.rest is None else plan.rest
        part = execute(inner, {**tensors, **cut}, dtype)
        if plan.output is None and parts:
            ours = plan.part.owns_result  # then the first part may take the others in
            whole = parts[0]
            parts = [whole.add_(part) if ours and not part.requires_grad else whole + part]
        else:
            parts.append(part)
    return parts[0] if plan.output is None else torch.cat(parts, plan.output.dim)


@singledispatch
def materialise(
    node: Node, shape: tuple[int, ...], tensors: Mapping[str, Tensor], like: Tensor
) -> Tensor:
    """The tensor of a node, of the given shape, with dtype and device of `like`."""
    raise TypeError(f"no tensor is known for the node {node!r}")


@materialise.register
def _operand(
    node: Operand, shape: tuple[int, ...], tensors: Mapping[str, Tensor], like: Tensor
) -> Tensor:
    tensor = tensors[node.name]
    dim = 0
    for leg in node.legs:
        for window in leg.windows:
            if window is not None:
                tensor = _windows(tensor, dim, window)
                dim += 1
            dim += 1
    return tensor if tensor.shape == shape else tensor.reshape(shape)


@materialise.register
def _(node: Ones, shape: tuple[int, ...], tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return torch.ones(shape, dtype=like.dtype, device=like.device)


@materialise.register
def _(node: Delta, shape: tuple[int, ...], tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return torch.eye(shape[0], dtype=like.dtype, device=like.device)


@materialise.register
def _(
    node: Primitive, shape: tuple[int, ...], tensors: Mapping[str, Tensor], like: Tensor
) -> Tensor:
    def tensor_of(operand: Operand) -> Tensor:
        return _operand(operand, tuple([size[a] for a in operand.axes]), tensors, like)

    size = node.size
    return PRIMITIVES[type(node)](node, size, tensor_of, like.dtype)


@materialise.register
def _(node: Pattern, shape: tuple[int, ...], tensors: Mapping[str, Tensor], like: Tensor) -> Tensor:
    small = prod(shape) <= CACHED_ELEMENTS
    build = _cached_pattern if small and _makes_plain_tensors() else pattern_tensor
    return build(node.anonymous, like.dtype, like.device)


def _makes_plain_tensors() -> bool:
    """Whether new tensors are real: not while compiling or under a dispatch mode."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def _windows(tensor: Tensor, dim: int, window: Window) -> Tensor:
    """The view of dimension `dim` as (outputs, kernels)."""
    reach = window.dilation * (window.kernels - 1) + 1
    if any(window.padding):
        widths = [0, 0] * (tensor.dim() - dim - 1) + list(window.padding)
        tensor = torch.nn.functional.pad(tensor, widths)
    view = tensor.unfold(dim, reach, window.stride).narrow(dim, 0, window.outputs)
    return view[..., :: window.dilation].movedim(-1, dim + 1)


def pattern_tensor(pattern: Pattern, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of an index pattern, axes (kernel, output, input) less the summed ones.

    Exact for every size and dtype: indices and counts are integers (TF32 would round
    indices over 2048, bfloat16 counts over 256) until the last conversion.
    """
    axis = pattern.axis
    kernel = torch.arange(axis.kernel_size, device=device)[:, None]
    output = torch.arange(axis.output_size, device=device)[None, :]
    input = output * axis.stride + kernel * axis.dilation - axis.padding[0]
    valid = (input >= 0) & (input < axis.input_size)
    index = torch.zeros_like(input)
    shape: list[int] = []
    for leg, place, extent in zip(pattern.legs, (kernel, output, input), axis.extents, strict=True):
        if leg is not None:
            index = index * extent + place
            shape.append(extent)
    tensor = torch.zeros(prod(shape), dtype=torch.int64, device=device)
    index = torch.where(valid, index, 0).flatten()
    return tensor.index_add_(0, index, valid.long().flatten()).reshape(shape).to(dtype)


CACHED_ELEMENTS = 1 << 16
"""Larger patterns are not kept: the cache is bounded in bytes too."""


@lru_cache(maxsize=1024)
def _cached_pattern(pattern: Pattern, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return pattern_tensor(pattern, dtype, device)


def einsum_expression(
    network: Network, tensors: Mapping[str, Tensor], simplified: bool = True
) -> tuple[str, list[Tensor], tuple[int, ...]]:
    """(equation, operands, shape): `torch.einsum(equation, *operands).reshape(shape)`.

    The scale of the network becomes an operand without axes; in half precision, where it
    could underflow, it is spread over the caller's tensors. Tensors other than views of the
    caller's are new, so they may be written to.
    """
    if simplified:
        network = simplify(network)
    network = network.closed()
    like = next(iter(tensors.values()))
    inputs, operands = [], []
    for node in network.nodes:
        inputs.append(node.axes)
        shape = tuple(network.size[a] for a in node.axes)
        tensor = materialise(node, shape, tensors, like)
        operands.append(tensor.clone() if isinstance(node, Pattern) else tensor)
    count = sum(isinstance(node, Operand) for node in network.nodes)
    if network.scale > 0 and network.scale != 1 and like.dtype in HALF and count:
        share = float(network.scale) ** (1 / count)
        for at, node in enumerate(network.nodes):
            operands[at] = operands[at] * share if isinstance(node, Operand) else operands[at]
    elif network.scale != 1:
        inputs.append(())
        operands.append(torch.full((), float(network.scale), dtype=like.dtype, device=like.device))
    return einsum_equation(inputs, network.output_axes), operands, network.shape
