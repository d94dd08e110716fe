"""Layers whose factors are contracted from the networks of their rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tn_kfac.layers.base import Ask, Cost, Layer, Saved
from tn_kfac.tensor_network.execute import execute
from tn_kfac.tensor_network.rows import Approx, Rows
from tn_kfac.tensor_network.slicing import DEFAULT_LIMIT, AnyPlan, plan


@dataclass(frozen=True)
class RowLayer(Layer):
    """A layer with networks of rows, of operands `x` (input) and `v` (output gradient)."""

    autocast: ClassVar[bool] = True
    casts: ClassVar[bool] = True

    @abstractmethod
    def prepare_input(self, x: Tensor) -> Tensor:
        """The input with a batch dimension, and with padding that is not zeros."""

    @abstractmethod
    def prepare_gradient(self, gradient: Tensor) -> Tensor:
        """The output gradient with a batch dimension."""

    @abstractmethod
    def input_rows(self, shape: torch.Size, output: torch.Size) -> Rows:
        """Rows of a prepared input of the given shape, whose output has the shape `output`."""

    @abstractmethod
    def gradient_rows(self, shape: torch.Size) -> Rows:
        """Rows of a prepared output gradient of the given shape."""

    def plans(self, shape: torch.Size, gradient: torch.Size, ask: Ask) -> tuple[AnyPlan, ...]:
        """The plans of a call's statistics, by shapes of input and output gradient.

        First of the input's factor (if the weight is trained), last of the gradient's.
        """
        inputs = self.prepare_input(torch.empty(shape, device="meta")).shape
        made = []
        outputs = _prepared(self, gradient)
        if ask.weight and ask.input == "rows":
            made.append(_rows_plan(self, inputs, gradient, ask.approx))
        elif ask.weight:
            made.append(_input_plan(self, inputs, gradient, ask.approx, ask.input_diagonal, False))
        if ask.weight and ask.bias and ask.input == "gram":
            made.append(_input_plan(self, inputs, gradient, ask.approx, False, True))
        if ask.output == "rows":
            return (*made, _rows_plan(self, None, outputs, ask.approx))
        return (*made, _gradient_plan(self, outputs, ask.approx, ask.output_diagonal))

    def cost(self, shape: torch.Size, gradient: torch.Size, ask: Ask) -> Cost:
        plans = self.plans(shape, gradient, ask)
        names = plans[0].lowerings if ask.weight else ("identity",)
        lowering = ", ".join(dict.fromkeys(names)) or "einsum"
        return Cost(sum(plan.flops for plan in plans), lowering)

    def counts(self, gradient: torch.Size) -> tuple[int, int]:
        rows = _gradient_rows(self, gradient)
        return rows.samples, rows.positions

    def input_factor(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Tensor:
        x = self.prepare_input(saved[0])
        made = _input_plan(self, x.shape, gradient, ask.approx, ask.input_diagonal, False)
        return execute(made, {"x": x}, ask.dtype)

    def input_total(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Tensor:
        x = self.prepare_input(saved[0])
        return execute(
            _input_plan(self, x.shape, gradient, ask.approx, False, True), {"x": x}, ask.dtype
        )

    def input_parts(self, saved: Saved, gradient: torch.Size, ask: Ask) -> Iterator[Tensor]:
        x = self.prepare_input(saved[0])
        _, positions = self.counts(gradient)
        columns = self.features_in * (positions if ask.approx == "expand" else 1)
        for part in _split(x, self.groups * columns):
            made = _rows_plan(self, part.shape, gradient, ask.approx)
            yield execute(made, {"x": part}, ask.dtype).reshape(self.groups, -1, self.features_in)

    def gradient_parts(self, saved: Saved, gradient: Tensor, ask: Ask) -> Iterator[Tensor]:
        v = self.prepare_gradient(gradient)
        made = _rows_plan(self, None, v.shape, ask.approx)
        yield execute(made, {"v": v}, ask.dtype).reshape(self.groups, -1, self.features_out)

    def thinned(
        self, saved: Saved, gradient: Tensor, start: int, every: int
    ) -> tuple[Saved, Tensor]:
        if self.prepare_gradient(gradient) is not gradient:
            return saved, gradient
        return tuple(x[start::every] for x in saved), gradient[start::every]

    def gradient_factor(self, saved: Saved, gradient: Tensor, ask: Ask) -> Tensor:
        v = self.prepare_gradient(gradient)
        return execute(
            _gradient_plan(self, v.shape, ask.approx, ask.output_diagonal), {"v": v}, ask.dtype
        )


def _prepared(layer: RowLayer, shape: torch.Size) -> torch.Size:
    return layer.prepare_gradient(torch.empty(shape, device="meta")).shape


def _split(x: Tensor, columns: int) -> Iterator[Tensor]:
    """Samples of x, as many at a time as may have rows of so many entries each."""
    yield from x.split(max(1, DEFAULT_LIMIT // max(1, columns)))


@lru_cache(maxsize=4096)
def _rows_plan(
    layer: RowLayer, shape: torch.Size | None, gradient: torch.Size, approx: Approx
) -> AnyPlan:
    """The plan of the rows of a prepared input; without its shape, of the output gradient."""
    if shape is None:
        return plan(layer.gradient_rows(gradient).matrix(approx))
    rows = layer.input_rows(shape, _prepared(layer, gradient))
    return plan(rows.matrix(approx, mean=True))


@lru_cache(maxsize=4096)
def _gradient_rows(layer: RowLayer, shape: torch.Size) -> Rows:
    return layer.gradient_rows(_prepared(layer, shape))


@lru_cache(maxsize=4096)
def _input_plan(
    layer: RowLayer,
    shape: torch.Size,
    gradient: torch.Size,
    approx: Approx,
    diagonal: bool,
    total: bool,
) -> AnyPlan:
    rows = layer.input_rows(shape, _prepared(layer, gradient))
    if total:
        return plan(rows.total(approx, mean=True))
    return plan(rows.factor(approx, mean=True, tied=rows.feature if diagonal else ()))


@lru_cache(maxsize=4096)
def _gradient_plan(layer: RowLayer, shape: torch.Size, approx: Approx, diagonal: bool) -> AnyPlan:
    rows = layer.gradient_rows(shape)
    return plan(rows.factor(approx, tied=rows.feature if diagonal else ()))
