"""How every public operation is called on a drawn case: tensors first, the rest by keyword."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from expressions.strategies import Case, cases, transposed_cases

Call = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and hyper-parameters by name


def _on_input(case: Case) -> Call:
    return {"x": case.x()}, {"kernel_size": case.kernel_size, **case.hyper}


def _on_input_and_output(case: Case) -> Call:
    return {"x": case.x(), "v": case.v()}, {"kernel_size": case.kernel_size, **case.hyper}


def _on_input_and_stacked_outputs(case: Case) -> Call:
    """Output gradients alone where the batch is odd, a stack of them where it is even."""
    tensors, hyper = _on_input_and_output(case)
    v = tensors["v"]
    stacked = v if case.batch % 2 else torch.stack([v, v.flip(0), v.cos()])
    return tensors | {"v": stacked}, hyper


def _on_weight_and_output(case: Case) -> Call:
    tensors = {"weight": case.weight(), "v": case.v()}
    return tensors, {"input_size": case.input_size, **case.hyper}


def _forward(case: Case) -> Call:
    return {"x": case.x(), "weight": case.weight()}, case.hyper


def _on_weight(case: Case) -> Call:
    return {"weight": case.weight()}, {"input_size": case.input_size, **case.hyper}


def _input_tangent(case: Case) -> Call:
    return {"tangent": case.x(), "weight": case.weight()}, case.hyper


def _weight_tangent(case: Case) -> Call:
    return {"x": case.x(), "tangent": case.weight()}, case.hyper


def _on_columns(case: Case) -> Call:
    shape = (case.batch, case.in_channels * prod(case.kernel_shape), prod(case.output_size))
    generator = torch.Generator().manual_seed(3)
    columns = torch.randn(*shape, dtype=torch.float64, generator=generator)
    named = {name: value for name, value in case.hyper.items() if name != "groups"}
    sizes = {"output_size": case.input_size, "kernel_size": case.kernel_size}
    return {"columns": columns}, sizes | named


def _on_output(case: Case) -> Call:
    return {"v": case.v()}, {"groups": case.groups}


CONVOLUTION: dict[str, Callable[[Case], Call]] = {
    "conv_forward": _forward,
    "conv_input_vjp": _on_weight_and_output,
    "conv_weight_vjp": _on_input_and_output,
    "conv_weight_vjp_per_example": _on_input_and_output,
    "conv_input_jvp": _input_tangent,
    "conv_weight_jvp": _weight_tangent,
    "unfold_input": _on_input,
    "unfold_kernel": _on_weight,
    "fold": _on_columns,
    "kfac_expand": _on_input,
    "kfac_reduce": _on_input,
    "kfac_expand_diagonal": _on_input,
    "kfac_reduce_diagonal": _on_input,
    "kfac_expand_block_diagonal": _on_input,
    "kfac_reduce_block_diagonal": _on_input,
    "kfac_expand_gradient": _on_output,
    "kfac_reduce_gradient": _on_output,
    "ggn_diagonal": _on_input_and_stacked_outputs,
    "ggn_gram": _on_input_and_stacked_outputs,
}
TRANSPOSED: dict[str, Callable[[Case], Call]] = {
    "conv_transpose_forward": _forward,
    "conv_transpose_input_vjp": _on_weight_and_output,
    "conv_transpose_weight_vjp": _on_input_and_output,
    "unfold_input_transpose": _on_input,
    "kfac_expand_transpose": _on_input,
    "kfac_reduce_transpose": _on_input,
}
CALLS = CONVOLUTION | TRANSPOSED


def cases_of(name: str, *dims):
    """The strategy of the cases that an operation is called on."""
    return transposed_cases(*dims) if name in TRANSPOSED else cases(*dims)
