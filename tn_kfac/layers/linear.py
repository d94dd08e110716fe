"""Linear layers with any number of shared dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tn_kfac.layers.base import Layer, Refused, Saved, layer_named, layer_of
from tn_kfac.layers.rows import RowLayer
from tn_kfac.tensor_network.network import Network, operand
from tn_kfac.tensor_network.rows import Rows


@dataclass(frozen=True)
class LinearLayer(RowLayer):
    """y[n, s…, :] = W x[n, s…, :]; every dimension between first and last is shared."""

    stored = "rows"

    def prepare_input(self, x: Tensor) -> Tensor:
        return x if x.dim() > 1 else x[None]

    def prepare_gradient(self, gradient: Tensor) -> Tensor:
        return self.prepare_input(gradient)

    def pixels(self, saved: Saved, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, v = self.prepare_input(saved[0]), self.prepare_gradient(gradient)
        return x.movedim(-1, 1), v.movedim(-1, 1)

    def input_rows(self, shape: torch.Size, output: torch.Size) -> Rows:
        return _rows("x", shape)

    def gradient_rows(self, shape: torch.Size) -> Rows:
        return _rows("v", shape)


def _rows(name: str, shape: torch.Size) -> Rows:
    """The last dimension as rows, in one group."""
    batch, *shared, features = shape
    axes = tuple(f"s{dim + 1}" for dim in range(len(shared)))
    node = operand(name, "n", *axes, ("g", "f"))
    sizes = {"n": batch, "g": 1, "f": features} | dict(zip(axes, shared, strict=True))
    output = (("n",), *((axis,) for axis in axes), ("g",), ("f",))
    return Rows(Network.build([node], output, sizes), ("n",), axes, ("g",), ("f",))


@dataclass(frozen=True)
class TransposedLinearLayer(LinearLayer):
    """The same with the weight stored as (in, out), as GPT-2 of HuggingFace does."""

    stored = "columns"

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT[None]

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0].mT


@layer_of.register
def _(module: nn.Linear) -> Layer:
    return LinearLayer(1, module.in_features, module.out_features)


@layer_of.register
def _(module: NonDynamicallyQuantizableLinear) -> None:
    """The out-projection of MultiheadAttention, which is never called: no hook fires."""
    return None


@layer_of.register
def _(module: nn.MultiheadAttention) -> Refused:
    return Refused("computes its projections without calling a layer")


@layer_named("transformers.pytorch_utils.Conv1D")
def conv1d_of_transformers(module: Any) -> Layer:
    """HuggingFace's Conv1D, a Linear with its weight transposed."""
    features_in, features_out = module.weight.shape
    return TransposedLinearLayer(1, features_in, features_out)
