"""The operations that are measured, and who implements them how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor

from benchmarks import implementations as by
from benchmarks.implementations import Case, call
from tn_kfac import expressions
from tn_kfac.tensor_network.execute import execute
from tn_kfac.tensor_network.slicing import plan

IMPLEMENTATIONS = ("ours", "unfold", "einconv", "torch")
PLANS = {"lowered": True, "einsum": False}
"""Our plan of a case, executed with kernels in place of its parts or without: measured where
asked for."""

Joins = Literal["mean", "sum", "cat"]


@dataclass(frozen=True)
class Operation:
    """An operation of `tn_kfac.expressions` and its baselines.

    Attributes:
        name: of our operation.
        inputs: the fields of a `Case` that it reads.
        joins: how the results of parts of a batch make the result of the batch.
        unfold: the implementation with unfold.
        copies: how many tensors as large as the unfolded input `unfold` holds at once.
        torch: torch's own operation.
        einconv: the module of `einconv.expressions`.
    """

    name: str
    inputs: tuple[str, ...]
    joins: Joins
    unfold: Callable[[Case], Tensor]
    copies: int
    torch: Callable[[Case], Tensor] | None = None
    einconv: str | None = None

    def least_bytes(self, case: Case, result: Tensor) -> int:
        """The bytes of the tensors that the operation must read and write, once each."""
        read = sum(getattr(case, name).nbytes for name in self.inputs)
        return read + result.nbytes

    def implementations(self) -> tuple[str, ...]:
        """The names of those who implement this operation."""
        missing = {name for name in ("torch", "einconv") if getattr(self, name) is None}
        return tuple(name for name in (*IMPLEMENTATIONS, *PLANS) if name not in missing)


_X, _XV = ("x",), ("x", "v")
OPERATIONS: Mapping[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "kfac_reduce", _X, "mean", by.unfold_kfac_reduce, 1, einconv="convNd_kfac_reduce"
        ),
        Operation("kfac_expand", _X, "mean", by.unfold_kfac_expand, 2, einconv="convNd_kfc"),
        Operation("kfac_reduce_diagonal", _X, "mean", by.unfold_kfac_reduce_diagonal, 1),
        Operation("kfac_expand_diagonal", _X, "mean", by.unfold_kfac_expand_diagonal, 2),
        Operation(
            "conv_forward", ("x", "weight"), "cat", by.unfold_conv_forward, 1,
            by.torch_conv_forward, "convNd_forward",
        ),
        Operation(
            "conv_input_vjp", ("weight", "v"), "cat", by.unfold_conv_input_vjp, 1,
            by.torch_conv_input_vjp, "convNd_input_vjp",
        ),
        Operation(
            "conv_weight_vjp", _XV, "sum", by.unfold_conv_weight_vjp, 2,
            by.torch_conv_weight_vjp, "convNd_weight_vjp",
        ),
        Operation(
            "conv_weight_vjp_per_example", _XV, "cat", by.unfold_conv_weight_vjp_per_example, 1,
            by.torch_conv_weight_vjp_per_example,
        ),
        Operation("unfold_input", _X, "cat", by.unfold_unfold_input, 1, einconv="convNd_unfold"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What is timed, and a lower bound of the bytes that it allocates (0: unknown)."""

    run: Callable[[], Tensor]
    needs: Callable[[], int]


def prepare(operation: Operation, implementation: str, case: Case) -> Prepared:
    """All that an implementation does before tensors are contracted.

    Raises:
        ImportError: If einconv is not installed.
    """
    if implementation == "ours":
        function = getattr(expressions, operation.name)
        return Prepared(lambda: call(function, operation.name, case), lambda: 0)
    if implementation in PLANS:
        positional, named = by.arguments(operation.name, case)
        bound, tensors = getattr(expressions, operation.name).bound(positional, named)
        planned = plan(bound.network, True, PLANS[implementation])
        return Prepared(lambda: execute(planned, tensors), lambda: 0)
    if implementation == "einconv":
        return _prepare_einconv(operation, case)
    if implementation == "torch":
        assert operation.torch is not None
        return Prepared(partial(operation.torch, case), lambda: 0)
    needs = operation.copies * case.layer.columns * case.x.element_size()
    return Prepared(partial(operation.unfold, case), lambda: needs)


def _prepare_einconv(operation: Operation, case: Case) -> Prepared:
    """Build einconv's simplified expression, as each call of a user of it does."""
    build = import_module(f"einconv.expressions.{operation.einconv}").einsum_expression
    if operation.name == "unfold_input":  # einconv's knows no groups, and needs none
        case = replace(case, layer=replace(case.layer, groups=1))
        equation, operands, shape = build(case.x, **case.layer.window, simplify=True)
    else:
        equation, operands, shape = call(partial(build, simplify=True), operation.name, case)

    def needs() -> int:
        """The largest intermediate and a copy of it with its axes in another order."""
        if not torch.backends.opt_einsum.is_available():
            return 0
        optimize = torch.backends.opt_einsum.strategy or "auto"
        opt_einsum = import_module("opt_einsum")
        _, info = opt_einsum.contract_path(equation, *operands, optimize=optimize)
        return 2 * int(info.largest_intermediate) * case.x.element_size()

    return Prepared(lambda: torch.einsum(equation, *operands).reshape(shape), needs)


def reference(operation: Operation, case: Case, part_bytes: int = 2**29) -> Tensor:
    """The result by unfold in float64, rounded to float32, computed in parts of the batch."""
    examples = len(case.x)
    per_example = operation.copies * case.layer.columns // examples * 8
    parts = _parts(case, max(1, part_bytes // per_example))
    if operation.joins == "cat":
        return torch.cat([operation.unfold(part).float() for part in parts])
    total = torch.zeros((), dtype=torch.float64, device=case.x.device)
    for part in parts:
        weight = len(part.x) / examples if operation.joins == "mean" else 1.0
        total = total + weight * operation.unfold(part)
    return total.float()


def _parts(case: Case, examples: int) -> Iterator[Case]:
    for x, v in zip(case.x.split(examples), case.v.split(examples), strict=True):
        yield Case(case.layer, x.double(), case.weight.double(), v.double())
